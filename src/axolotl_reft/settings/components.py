"""Components of a decoder layer: pyreft's names for them, and module paths.

A name such as ``mlp_output`` stands for a module of the layer and its input or output;
``mlp.down_proj.output``, or ``model.layers[15].mlp.output`` as pyreft writes it, says
the same by the module's path.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

# A path within the layer, or from the model's list of layers on.
_PATH = re.compile(
    r"(?:(?P<list>\w+(?:\.\w+)*)\[(?P<layer>\d{1,9})\]\.)?"
    r"(?:(?P<path>\w+(?:\.\w+)*)\.)?(?P<side>input|output)",
    re.ASCII,
)

# Arguments that tell experts which tokens are theirs.
_ROUTING = re.compile("top_k|rout|selected")

_LAYER = ("",)
_MLP = ("mlp", "feed_forward", "block_sparse_moe")
_ATTENTION = ("self_attn", "attn", "attention")


def _within(parents: tuple[str, ...], *children: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{child}" for parent in parents for child in children)


# pyvene's names: the side, and the module's path in the architectures of transformers.
_NAMES = {
    "block_input": ("input", _LAYER),
    "block_output": ("output", _LAYER),
    "mlp_input": ("input", _MLP),
    "mlp_activation": ("output", _within(_MLP, "act_fn", "act", "activation_fn")),
    "mlp_output": ("output", _MLP),
    "attention_input": ("input", _ATTENTION),
    "attention_value_output": (
        "input",
        _within(_ATTENTION, "o_proj", "c_proj", "dense"),
    ),
    "attention_output": ("output", _ATTENTION),
    "query_output": ("output", _within(_ATTENTION, "q_proj")),
    "key_output": ("output", _within(_ATTENTION, "k_proj")),
    "value_output": ("output", _within(_ATTENTION, "v_proj")),
}
COMPONENTS = tuple(_NAMES)


def from_pyreft_name(name: object) -> tuple[int | None, str] | None:
    """Return the layer, if it is named, and our component for one of pyreft's; None
    for what is not a component."""
    if name in COMPONENTS:
        return None, str(name)
    match = _PATH.fullmatch(name) if isinstance(name, str) else None
    if match is None or not (match["list"] or match["path"]):
        return None
    layer = int(match["layer"]) if match["layer"] else None
    path, side = match["path"], match["side"]
    return layer, f"{path}.{side}" if path else f"block_{side}"


def component_layer(component: str) -> int | None:
    """Return the layer that a path of pyreft's names, or None."""
    read = from_pyreft_name(component)
    return read[0] if read else None


def to_pyreft_name(component: str, layers: str, layer: int) -> str:
    """Return pyreft's name of our component, or its path in a model whose list of
    layers is at ``layers``."""
    read = from_pyreft_name(component)
    ours = read[1] if read else component
    path, _, side = ours.rpartition(".")
    for name, (its_side, paths) in _NAMES.items():
        if name == ours or (side == its_side and path in paths):
            return name
    return f"{layers}[{layer}].{ours}"


def check_list_of_layers(component: str, layers: str) -> None:
    """Raise ValueError if a path of pyreft's begins with another list of layers than
    the model's. Either path may begin further up in the model."""
    match = _PATH.fullmatch(component)
    if match is None or match["list"] is None:
        return
    ends = f".{match['list']}", f".{layers}"
    if not ends[0].endswith(ends[1]) and not ends[1].endswith(ends[0]):
        raise ValueError(
            f"component: {component!r} is in {match['list']}, and this model's layers "
            f"are in {layers}; write {layers}[{match['layer']}]"
        )


def as_wide_as_the_model(component: str) -> bool:
    """Whether what is edited has the hidden size in every model."""
    _, paths = _NAMES.get(component, ("", ()))
    return paths in (_LAYER, _MLP, _ATTENTION)


def find_site(component: str, layer: nn.Module, config: Any) -> tuple[str, int]:
    """Return the path and side of a component in a decoder layer, such as
    ``mlp.output``, and its width by the language model's config; ValueError if the
    layer, whose own path is empty, has no such module."""
    read = from_pyreft_name(component)
    assert read is not None, "checked by the config"
    path, _, side = read[1].rpartition(".")
    side, paths = _NAMES.get(read[1], (side, (path,)))
    modules = dict(layer.named_modules())
    for path in paths:
        if path in modules:
            return f"{path}.{side}", _width(path, modules[path], side, config)
    number = re.search(r"\.(\d+)\.", component)
    raise ValueError(
        f"component: {component!r} is not in {type(layer).__name__}, which has "
        f"{', '.join(name for name, _ in layer.named_children())}; name one of its "
        "modules by path, for example mlp.output"
        + (f"; a layer's number stands in brackets: [{number[1]}]" if number else "")
    )


def is_inside_experts(layer: nn.Module, path: str) -> bool:
    """Return whether a module of a decoder layer sees the tokens that were routed to
    experts, in their order. Experts that are one module, and do the routing
    themselves, take and return all tokens."""
    module, names = layer, path.split(".") if path else []
    for depth, name in enumerate(names, 1):
        module = module.get_submodule(name)
        kind = f"{name} {type(module).__name__}".lower()
        if "expert" not in kind or "shared" in kind:
            continue
        routes = _ROUTING.search(str(inspect.signature(module.forward)))
        if depth < len(names) or not routes:
            return True
    return False


def _width(path: str, module: Any, side: str, config: Any) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features if side == "input" else module.out_features
    if hasattr(module, "nx") and hasattr(module, "nf"):  # GPT-2's Conv1D
        return module.nx if side == "input" else module.nf
    if path in _NAMES["mlp_activation"][1]:
        return getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return config.hidden_size
