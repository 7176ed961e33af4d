"""An adapter's tensors: their keys, checks that all are there and finite, and the base
of the modules that hold them.

A key in a file is ``base_model.model.<path of the layers>.<layer>.<part>.<tensor>``,
where the part is ``intv_0``, ``intv_1`` (the suffix's intervention, where untied) or
``intv_lora``. In a model the adapter's name stands ahead of the tensor's.

PEFT only warns of missing tensors, which would keep their random start. Torch only.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

_PART = r"intv_(?P<part>0|1|lora)"
_SAVED = re.compile(rf"base_model\.model\.(.+)\.(\d+)\.{_PART}\.(\w+)")
_IN_A_MODEL = re.compile(rf"\.{_PART}\.(?P<adapter>[^.]+)\.\w+$")

# In paths of checkpointed modules, and not in their state dicts.
_CHECKPOINTED = "_checkpoint_wrapped_module."
_REMEDY = "save the adapter again, or load another checkpoint, on the base it is for"


class SavedKey(NamedTuple):
    """A saved tensor's key: the path of the base model's list of layers, the layer's
    number, the side (None for LoRA), and the tensor's name."""

    layers: str
    layer: int
    side: int | None
    tensor: str


def parse_saved_key(key: str) -> SavedKey | None:
    """Read a key of an adapter's file; None if it is not of an intervention or LoRA."""
    if (match := _SAVED.fullmatch(key)) is None:
        return None
    layers, layer, part, tensor = match.groups()
    side = None if part == "lora" else int(part)
    return SavedKey(layers, int(layer), side, tensor)


def adapter_of(key: str) -> str | None:
    """Return the name of the adapter that a tensor of a model belongs to, if any."""
    match = _IN_A_MODEL.search(key)
    return match["adapter"] if match else None


def check_values(key: str, tensor: Tensor, file: str = "the adapter") -> None:
    """Raise ``ValueError`` if a tensor saved in ``file`` has NaN or infinite values."""
    # The values of a shard or a placeholder are not here.
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return
    if not tensor.isfinite().all():
        raise ValueError(
            f"tensor {key!r} of {file} has NaN or infinite values: training diverged; "
            "load an earlier checkpoint, or train again with a lower learning rate"
        )


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], file: str
) -> None:
    """Raise ``ValueError`` if a tensor of ``file`` is missing, unexpected, of another
    shape than ``expected``, or not finite."""
    _check_names(tensors, expected, file)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"tensor {name!r} in {file} has shape {tuple(tensors[name].shape)}, "
                f"expected {shape}; {_REMEDY}"
            )
        check_values(name, tensors[name], file)


def check_complete(loaded: Collection[str], model: Iterable[str]) -> None:
    """Raise ``ValueError`` if the keys ``loaded`` hold only part of an adapter, or no
    adapter of the ``model``, whose parameters' and buffers' names are given.

    Keys of a base model that has an adapter may come without it.
    """
    found = _by_adapter(loaded)
    expected = _by_adapter(name.replace(_CHECKPOINTED, "") for name in model)
    adapters = found.keys() & expected.keys()
    if not adapters and not any(".base_layer." in key for key in loaded):
        raise ValueError(f"the weights hold no LoReFT adapter of this model; {_REMEDY}")
    for adapter in adapters:
        _check_names(found[adapter], expected[adapter], "the state dict")


def _check_names(found: Collection[str], expected: Collection[str], file: str) -> None:
    if missing := sorted(set(expected) - set(found)):
        raise ValueError(f"missing tensor {missing[0]!r} in {file}; {_REMEDY}")
    if unexpected := sorted(set(found) - set(expected)):
        raise ValueError(f"unexpected tensor {unexpected[0]!r} in {file}; {_REMEDY}")


def _by_adapter(keys: Iterable[str]) -> dict[str, set[str]]:
    found = defaultdict(set)
    for key in keys:
        if (adapter := adapter_of(key)) is not None:
            found[adapter].add(key)
    return found


class AdapterLeaf(nn.Module):
    """A module with its parameters directly on it, which stay in float32 under a cast,
    start anew where ``to_empty`` has dropped them, and are checked when they are
    loaded."""

    def reset_parameters(self) -> None:
        """Fill the parameters and buffers with what a new adapter starts from."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def without_cast(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return out if out.dtype == tensor.dtype else tensor.to(out.device)

        had_values = not any(tensor.is_meta for tensor in self.parameters())
        super()._apply(without_cast, recurse)
        # A parent's to_empty is known by this function alone. It leaves what was in
        # memory, and the weights loaded next may be the base's alone.
        if getattr(fn, "__qualname__", "").startswith("Module.to_empty"):
            self.reset_parameters()
            if had_values:
                warnings.warn(
                    "LoReFT: to_empty drops the adapter's values, which start anew; "
                    "make or load the adapter after it",
                    UserWarning,
                    stacklevel=2,
                )
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        for name, tensor in self.state_dict(keep_vars=True).items():
            key = prefix + name
            if (saved := state_dict.get(key)) is None:
                continue
            if saved.shape != tensor.shape:
                raise ValueError(
                    f"the adapter's {key} has shape {tuple(saved.shape)}, but this "
                    f"base model needs {tuple(tensor.shape)}; load it on the base "
                    "model it was trained on"
                )
            check_values(key, saved)
            # FSDP2 loads with assign=True, and wraps what it hands over: a parameter
            # would take the place of a buffer, and be trained.
            if name in self._buffers and isinstance(saved, nn.Parameter):
                state_dict[key] = saved.detach()
        super()._load_from_state_dict(state_dict, prefix, *args)
