"""Checks of an adapter's tensors: all there, of their shapes, finite.

PEFT only warns of missing tensors, which would keep their random start. Torch only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from axolotl_reft.core.keys import adapter_of

# Put into paths by checkpointing, and taken out of those in a state dict.
_CHECKPOINTED = "_checkpoint_wrapped_module."
_REMEDY = (
    "save the adapter again, or load another checkpoint, on the base model it was "
    "trained on"
)


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
    """Check that ``tensors`` of ``file`` have the ``expected`` shapes, by name.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    _check_names(tensors, expected, file)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"tensor {name!r} in {file} has shape {tuple(tensors[name].shape)}, "
                f"expected {shape}; {_REMEDY}"
            )
        check_values(name, tensors[name], file)


def check_complete(loaded: Collection[str], model: Iterable[str]) -> None:
    """Check that a state dict has every tensor of an adapter, or none of them.

    Args:
        loaded: keys of the state dict.
        model: names of the model's parameters and buffers.

    Raises:
        ValueError: tensors are missing or unexpected, or the state dict is of no
            adapter of the model, nor of a base model that has one.
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
