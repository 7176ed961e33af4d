"""What an adapter's numbers must be: all there, of their shapes, floating and finite.

PEFT only warns of missing ones, and what is missing keeps its random start. Torch only.

Shapes: D width of what is edited, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from axolotl_reft.errors import shown

# Each number of an intervention, and its shape.
_ROTATION = {"rotation": "DR", "rotation_base": "DR"}
_AFFINE = {"weight": "RD", "bias": "R"}
NUMBERS = {
    "loreft": _ROTATION | _AFFINE,
    "noreft": _AFFINE | {"proj_weight": "RD"},
    "direft": _AFFINE | {"proj_weight": "RD"},
    "orthogonal_direft": _ROTATION | _AFFINE,
    "consreft": _ROTATION | {"bias": "R"},
    "lobireft": _ROTATION | {"bias": "R"},
}

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_IN_A_MODEL = re.compile(r"\.intv_(?:[01]|lora)\.(?P<adapter>[^.]+)\.\w+$")
# Put into paths by checkpointing, and taken out of those in a state dict.
_CHECKPOINTED = "_checkpoint_wrapped_module."
_REMEDY = "save the adapter again, or load another checkpoint of it"


def check_values(key: str, tensor: Tensor) -> None:
    """See that saved numbers are numbers.

    Raises:
        ValueError: they are not floating-point, or not finite.
    """
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"the adapter's {shown(key)} is of type {tensor.dtype}, not floating-point "
            f"numbers; {_REMEDY}"
        )
    # A shard's or a placeholder's values are not here to be seen.
    if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
        if not tensor.isfinite().all():
            raise ValueError(
                f"the adapter's {shown(key)} has numbers that are not finite, as a "
                "training that diverged leaves them; load an earlier checkpoint, or "
                "train it again with a lower learning rate"
            )


def check_intervention(
    kind: str, rank: int, tensors: Mapping[str, Tensor], place: str
) -> None:
    """See that these are the numbers of one intervention.

    Args:
        kind: its name in the configuration.
        tensors: by their names; width D is what they agree on.
        place: where it is, for the message.

    Raises:
        ValueError: one is missing, unknown, of a wrong shape, or no number.
    """
    shapes = NUMBERS[kind]
    for name in shapes:
        if name not in tensors:
            raise ValueError(
                f"{name} is missing in {place}, and would be random; {_REMEDY}"
            )
    matrix, axes = next((n, axes) for n, axes in shapes.items() if len(axes) == 2)
    matrix_shape = tuple(tensors[matrix].shape)
    width = matrix_shape[axes.index("D")] if len(matrix_shape) == 2 else 0
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ValueError(
                f"{shown(name)} in {place} is no number of intervention: {kind}; "
                f"{_REMEDY}"
            )
        expected = tuple({"D": width, "R": rank}[axis] for axis in shapes[name])
        if tuple(tensor.shape) != expected or width < rank:
            raise ValueError(
                f"{name} in {place} has shape {tuple(tensor.shape)}, which is not "
                f"that of intervention: {kind} with rank: {rank}; {_REMEDY}"
            )
        check_values(f"{name} in {place}", tensor)
    base_DR = tensors.get("rotation_base")
    if base_DR is not None and not (base_DR.diagonal().abs() == 1).all():
        raise ValueError(
            f"rotation_base in {place} has not the signs that make a rotation on its "
            f"diagonal; {_REMEDY}"
        )


def check_lora(
    r: int, targets: str | list[str], tensors: Mapping[str, Tensor], place: str
) -> None:
    """See that these are the matrices A and B of LoRA in one layer.

    Args:
        targets: the modules asked for; ``all-linear`` depends on the base.
        tensors: by their names, ``<module>_A`` (r, in) and ``<module>_B`` (out, r).

    Raises:
        ValueError: one is missing, of a wrong shape, or no number.
    """
    stems = {name[:-2] for name in tensors}
    for stem in sorted(stems):
        for side, axis in (("A", 0), ("B", 1)):
            tensor = tensors.get(f"{stem}_{side}")
            if tensor is None:
                raise ValueError(
                    f"{stem}_{side} is missing in {place}, and would be random; "
                    f"{_REMEDY}"
                )
            if tensor.ndim != 2 or tensor.shape[axis] != r or not tensor.numel():
                raise ValueError(
                    f"{stem}_{side} in {place} has shape {tuple(tensor.shape)}, which "
                    f"is not that of lora with r: {r}; {_REMEDY}"
                )
            check_values(f"{stem}_{side} in {place}", tensor)
    for target in () if isinstance(targets, str) else targets:
        stem = target.replace(".", "_")
        if not any(name == stem or name.endswith(f"_{stem}") for name in stems):
            raise ValueError(
                f"LoRA's {shown(target)} is missing in {place}, and would be random; "
                f"{_REMEDY}"
            )


def check_complete(given: Iterable[str], own: Iterable[str]) -> None:
    """See that a state dict has all or none of an adapter's numbers.

    Args:
        given: keys of the state dict to load.
        own: names of the model's parameters and buffers.

    Raises:
        ValueError: some are missing or unknown; or there is nothing of any adapter, nor
            of a base model with one.
    """
    given = set(given)
    own = {name.replace(_CHECKPOINTED, "") for name in own}
    adapters = {m["adapter"] for key in own if (m := _IN_A_MODEL.search(key))}
    loaded = {m["adapter"] for key in given if (m := _IN_A_MODEL.search(key))}
    if not loaded & adapters and not any(".base_layer." in key for key in given):
        raise ValueError(
            "the weights hold no LoReFT intervention of this model, and all of the "
            f"adapter would be random; {_REMEDY}"
        )
    for adapter in loaded & adapters:
        expected = {k for k in own if _adapter_of(k) == adapter}
        found = {k for k in given if _adapter_of(k) == adapter}
        if missing := sorted(expected - found):
            raise ValueError(
                f"the weights lack {len(missing)} of the adapter's {len(expected)} "
                f"tensors, {shown(missing[0])} among them, which would be random; "
                f"{_REMEDY}"
            )
        if unknown := sorted(found - expected):
            raise ValueError(
                f"the weights hold {shown(unknown[0])}, for which this model has no "
                "place; load the adapter on the base model it was trained on"
            )


def _adapter_of(key: str) -> str | None:
    match = _IN_A_MODEL.search(key)
    return match["adapter"] if match else None
