"""Checks of an adapter's tensors: all there, of their shapes, finite.

PEFT only warns of missing tensors, which would keep their random start. Torch only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from axolotl_reft.core.keys import adapter_of

# Put into paths by checkpointing, and taken out of those in a state dict.
_CHECKPOINTED = "_checkpoint_wrapped_module."
_REMEDY = "save the adapter again, or load another checkpoint of it"


def check_values(key: str, tensor: Tensor, file: str = "the adapter") -> None:
    """Check that a saved tensor has no NaN or infinite value.

    Args:
        file: the file it is from, for the message.

    Raises:
        ValueError: it has.
    """
    # The values of a shard or a placeholder are not here.
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return
    if not tensor.isfinite().all():
        raise ValueError(
            f"tensor {key!r} of {file} has NaN or infinite values, as a training that "
            "diverged leaves them; load an earlier checkpoint, or train it again with "
            "a lower learning rate"
        )


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], file: str
) -> None:
    """Check that these are the expected tensors, with finite values.

    Args:
        tensors: by name.
        expected: shape of each tensor, by name.
        file: the file they are from, for the message.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"missing tensor {name!r} in {file}; {_REMEDY}")
        if tensors[name].shape != shape:
            raise ValueError(
                f"tensor {name!r} in {file} has shape {tuple(tensors[name].shape)}, "
                f"expected {shape}; {_REMEDY}"
            )
        check_values(name, tensors[name], file)
    if unexpected := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"unexpected tensor {unexpected[0]!r} in {file}; {_REMEDY}")


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
    if not found.keys() & expected and not any(".base_layer." in key for key in loaded):
        raise ValueError(f"the weights hold no LoReFT adapter of this model; {_REMEDY}")
    for adapter in found.keys() & expected:
        if missing := sorted(expected[adapter] - found[adapter]):
            raise ValueError(
                f"missing tensor {missing[0]!r} of the adapter, one of {len(missing)} "
                f"missing of {len(expected[adapter])}; {_REMEDY}"
            )
        if unexpected := sorted(found[adapter] - expected[adapter]):
            raise ValueError(
                f"unexpected tensor {unexpected[0]!r} of the adapter, for which this "
                "model has no place; load it on the base model it was trained on"
            )


def _by_adapter(keys: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for key in keys:
        if (adapter := adapter_of(key)) is not None:
            found.setdefault(adapter, set()).add(key)
    return found
