"""Components of a decoder layer: pyreft's names for them, and module paths.

A name such as ``mlp_output`` stands for a module of the layer and one of its sides;
``mlp.down_proj.output``, or ``model.layers[15].mlp.output`` as pyreft writes it, says
the same by the module's own path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

_MLP = ("mlp", "feed_forward", "block_sparse_moe")
_ATTENTION = ("self_attn", "attn", "attention")


def _within(parents: tuple[str, ...], *children: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{child}" for parent in parents for child in children)


# A module's path within the layer, or from the list of layers on.
_PATH = re.compile(
    r"(?P<path>\w+(?:\.\w+)*)"
    r"|(?P<list>\w+(?:\.\w+)*)\[(?P<layer>\d{1,9})\](?:\.(?P<rest>\w+(?:\.\w+)*))?",
    re.ASCII,
)

# pyvene's names, and where the architectures of transformers keep what they mean.
_NAMES = {
    "block_input": ("",),
    "block_output": ("",),
    "mlp_input": _MLP,
    "mlp_activation": _within(_MLP, "act_fn", "act", "activation_fn"),
    "mlp_output": _MLP,
    "attention_input": _ATTENTION,
    "attention_value_output": _within(_ATTENTION, "o_proj", "c_proj", "dense"),
    "attention_output": _ATTENTION,
    "query_output": _within(_ATTENTION, "q_proj"),
    "key_output": _within(_ATTENTION, "k_proj"),
    "value_output": _within(_ATTENTION, "v_proj"),
}
# The others are named for their side.
_SIDES = {"mlp_activation": "output", "attention_value_output": "input"}
COMPONENTS = tuple(_NAMES)
_AS_WIDE_AS_THE_MODEL = tuple(
    name
    for name in COMPONENTS
    if name.startswith(("block", "mlp", "attention")) and name not in _SIDES
)


@dataclass(frozen=True)
class Site:
    """A module of a decoder layer and the side of it that is edited.

    Attributes:
        path: of the module within the layer; empty for the layer itself.
        side: ``input`` or ``output``.
    """

    path: str
    side: str


def is_component(component: object) -> bool:
    """Whether it is a name or a path, of whatever model."""
    return from_pyreft_name(component) is not None


def component_layer(component: str) -> int | None:
    """The layer that a path of pyreft's names, or None."""
    read = from_pyreft_name(component)
    return read[0] if read else None


def check_list_of_layers(component: str, layers: str) -> None:
    """See that a path of pyreft's begins with the model's list of layers.

    Args:
        layers: the path of that list; either may begin further up in the model.

    Raises:
        ValueError: it begins with another.
    """
    head = component.rpartition(".")[0]
    match = None if component in COMPONENTS else _PATH.fullmatch(head)
    if match is None or match["list"] is None:
        return
    ends = f".{match['list']}", f".{layers}"
    if not ends[0].endswith(ends[1]) and not ends[1].endswith(ends[0]):
        raise ValueError(
            f"component: {component!r} is in {match['list']}, and this model's layers "
            f"are in {layers}; write {layers}[{match['layer']}]"
        )


def as_wide_as_the_model(component: str) -> bool:
    """Whether what is edited surely has the hidden size, whatever the model."""
    return component in _AS_WIDE_AS_THE_MODEL


def _parse_path(component: object) -> tuple[int | None, Site] | None:
    if not isinstance(component, str) or "." not in component:
        return None
    head, _, side = component.rpartition(".")
    if side not in ("input", "output"):
        return None
    match = _PATH.fullmatch(head)
    if match is None:
        return None
    layer = None if match["layer"] is None else int(match["layer"])
    return layer, Site(match["rest"] or match["path"] or "", side)


def from_pyreft_name(name: object) -> tuple[int | None, str] | None:
    """The layer, if it is named, and our component for one of pyreft's.

    Returns:
        None for what is not a component here.
    """
    if isinstance(name, str) and name in COMPONENTS:
        return None, name
    parsed = _parse_path(name)
    if parsed is None:
        return None
    layer, site = parsed
    return layer, f"{site.path}.{site.side}" if site.path else f"block_{site.side}"


def to_pyreft_name(component: str, layers: str, layer: int) -> str:
    """pyreft's component: a name where it has one, or the path below the model.

    Args:
        component: ours.
        layers: path of the model's list of layers, such as ``model.layers``.
        layer: number of the layer.
    """
    parsed = None if component in COMPONENTS else _parse_path(component)
    if parsed is None:
        return component
    site = parsed[1]
    for name, paths in _NAMES.items():
        if site.path in paths and site.side == _side(name):
            return name
    return ".".join(filter(None, (f"{layers}[{layer}]", site.path, site.side)))


def find_site(component: str, layer: nn.Module, config: Any) -> tuple[Site, int]:
    """Find a component in a layer, and its width.

    Args:
        component: a name or a path.
        layer: a decoder layer.
        config: the language model's transformers config.

    Raises:
        ValueError: the layer has no such module.
    """
    if component in COMPONENTS:
        paths, side = _NAMES[component], _side(component)
    else:
        parsed = _parse_path(component)
        assert parsed is not None, "checked by the config"
        paths, side = (parsed[1].path,), parsed[1].side
    modules = dict(layer.named_modules())
    for path in paths:
        if path in modules:
            return Site(path, side), _width(path, modules[path], side, config)
    number = re.search(r"\.(\d+)\.", component)
    raise ValueError(
        f"component: {component!r} is not in {type(layer).__name__}, which has "
        f"{', '.join(name for name, _ in layer.named_children())}; name one of its "
        "modules by path, for example mlp.output"
        + (f". A layer's number stands in brackets: [{number[1]}]" if number else "")
    )


def _side(name: str) -> str:
    return _SIDES.get(name) or name.rpartition("_")[2]


def _width(path: str, module: Any, side: str, config: Any) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features if side == "input" else module.out_features
    if hasattr(module, "nx") and hasattr(module, "nf"):  # GPT-2's Conv1D
        return module.nx if side == "input" else module.nf
    if path in _NAMES["mlp_activation"]:
        return getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return config.hidden_size
