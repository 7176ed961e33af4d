"""Our interventions and pyreft's own objects, one made from the other.

Shapes: D hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.core.kinds import KINDS
from axolotl_reft.core.rotation import compact_base, rotation, square_base

# How far from orthonormal a saved R may be: bfloat16 rounding passes, pyreft's drift
# after a resume (0.05 and more, stanfordnlp/pyreft#179) does not.
ORTHONORMALITY_TOLERANCE = 0.02

# pyreft's names for our numbers. R is under a name of its own in LoReFT's files and
# under torch's parametrization in the others'.
_AFFINE = {"learned_source.weight": "weight", "learned_source.bias": "bias"}
_NAMES = {
    "loreft": {"weight": "weight", "bias": "bias"},
    "noreft": {**_AFFINE, "proj_layer.weight": "proj_weight"},
    "direft": {**_AFFINE, "proj_layer.weight": "proj_weight"},
    "orthogonal_direft": _AFFINE,
    "consreft": {"learned_source": "bias"},
    "lobireft": {"learned_source": "bias"},
}
_PARAMETRIZATION = "rotate_layer.parametrizations.weight"
# Bookkeeping of pyvene's.
_IGNORED = ("embed_dim", "interchange_dim")


def pyreft_class(intervention: str) -> type[nn.Module]:
    """pyreft's class for our name of an intervention."""
    import pyreft

    return getattr(pyreft, KINDS[intervention].pyreft_class)


def make_pyreft_object(
    intervention: str, ours: Any, act_fn: str | None, dropout: float
) -> nn.Module:
    """pyreft's own object with the numbers of ours, in float32.

    A rotation gets the same base and vectors, so that a training goes on alike.
    """
    theirs = pyreft_class(intervention)(
        embed_dim=ours.hidden_size,
        low_rank_dimension=ours.rank,
        dtype=torch.float32,
        add_bias=False,
        act_fn=act_fn,
        dropout=dropout,
    )
    numbers = dict(ours.named_parameters())
    with torch.no_grad():
        own = dict(theirs.named_parameters())
        for name, our_name in _NAMES[intervention].items():
            target = own.get(name)
            if target is None:  # LoReFT's file has shorter names than its modules
                target = own[f"learned_source.{name}"]
            target.copy_(numbers[our_name])
        if "rotation" in numbers:
            vectors = theirs.get_submodule(_PARAMETRIZATION)
            vectors.get_buffer("0.base").copy_(square_base(ours.rotation_base))
            unit_DR = torch.zeros_like(ours.rotation).fill_diagonal_(1)
            vectors.get_parameter("original").copy_(ours.rotation.tril(-1) - unit_DR)
    return theirs


def read_pyreft_state(
    intervention: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our state dict for the state dict of one of pyreft's objects.

    Args:
        intervention: our name of the kind.
        state: as ``torch.load`` gave it.

    Raises:
        ValueError: a number is missing, unknown, not finite or of a wrong shape, or R
            is not orthonormal.
    """
    left = _checked(state)
    numbers = {}
    for name, our_name in _NAMES[intervention].items():
        if name not in left:
            raise ValueError(f"{name!r} is missing, so this is no {intervention}")
        numbers[our_name] = left.pop(name)
    if "rotation" in _state_names(intervention):
        numbers["R"] = _pop_rotation(left)
    if "proj_layer.bias" in left:
        raise ValueError(
            "'proj_layer.bias': it was trained with add_bias=True, which has no "
            "counterpart here; train it without"
        )
    if left:
        raise ValueError(f"{sorted(left)[0]!r} does not belong to {intervention}")
    _check_shapes(numbers)
    if (r_DR := numbers.pop("R", None)) is not None:
        _check_orthonormal(r_DR, intervention)
        numbers["rotation"] = torch.zeros_like(r_DR)
        numbers["rotation_base"] = compact_base(r_DR)
    return numbers


def read_as_noreft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoReFT of pyreft's as NoReFT, which computes the same for any R."""
    names = {
        "weight": "learned_source.weight",
        "bias": "learned_source.bias",
        "rotate_layer": "proj_layer.weight",
    }
    renamed = {names.get(key, key): value for key, value in _checked(state).items()}
    matrix = renamed["proj_layer.weight"]
    if matrix.ndim != 2:
        raise ValueError(f"'rotate_layer' has shape {tuple(matrix.shape)}")
    return read_pyreft_state("noreft", renamed | {"proj_layer.weight": matrix.T})


def _checked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The numbers of a state dict in float32, once they are seen to be numbers."""
    left = {key: value for key, value in state.items() if key not in _IGNORED}
    for name, tensor in left.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name!r} is not a tensor of numbers")
        if tensor.dtype.itemsize == 1 or not _held(tensor):
            raise ValueError(f"{name!r} is not an ordinary tensor of numbers")
        if not tensor.isfinite().all():
            raise ValueError(f"{name!r} has numbers that are not finite")
    return {name: tensor.float() for name, tensor in left.items()}


def _held(tensor: Tensor) -> bool:
    """Whether each of its numbers is there: it is not sparse, nor a huge tensor that
    stands on a few numbers."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize


def _state_names(intervention: str) -> set[str]:
    made = INTERVENTION_CLASSES[intervention](embed_dim=1, low_rank_dimension=1)
    return set(made.state_dict())


def _pop_rotation(left: dict[str, Tensor]) -> Tensor:
    """R (D, R) from a state dict: itself, or torch's vectors and D×D base."""
    if "rotate_layer" in left:
        return left.pop("rotate_layer")
    try:
        vectors_DR = left.pop(f"{_PARAMETRIZATION}.original")
        base_DD = left.pop(f"{_PARAMETRIZATION}.0.base")
    except KeyError as error:
        raise ValueError(f"{error} is missing, so there is no rotation") from None
    size = vectors_DR.shape[0] if vectors_DR.ndim == 2 else -1
    if base_DD.shape != (size, size) or vectors_DR.shape[1] > size:
        raise ValueError(
            f"the rotation's base has shape {tuple(base_DD.shape)}, and its vectors "
            f"{tuple(vectors_DR.shape)}"
        )
    plain_DR = compact_base(torch.eye(*vectors_DR.shape))
    q_DR = rotation(vectors_DR, plain_DR)
    # What torch multiplies by as well; see fault 3 of pyreft's: after a step of weight
    # decay it is zero, and with it R.
    return base_DD @ (q_DR * -vectors_DR.diagonal().int())


def _check_orthonormal(r_DR: Tensor, intervention: str) -> None:
    remedy = "train it again"
    if intervention == "loreft":
        remedy = "the same function without the constraint is --intervention noreft"
    if not r_DR.any():
        raise ValueError(
            "the rotation is zero, as weight decay leaves pyreft's, so that it edits "
            f"nothing; train without weight decay, or {remedy}"
        )
    error = (r_DR.T @ r_DR - torch.eye(r_DR.shape[1])).abs().max().item()
    if error > ORTHONORMALITY_TOLERANCE:
        raise ValueError(
            f"the rotation is not orthonormal (off by {error:.3f}), as pyreft's are "
            f"after it resumed a training (stanfordnlp/pyreft#179); {remedy}"
        )


def _check_shapes(numbers: Mapping[str, Tensor]) -> None:
    name, matrix = next((n, t) for n, t in numbers.items() if n != "bias")
    shape = tuple(matrix.shape[::-1] if name == "R" else matrix.shape)
    if len(shape) != 2 or not 1 <= shape[0] <= shape[1]:
        raise ValueError(f"{name!r} has shape {tuple(matrix.shape)}, no matrix's")
    rank, size = shape
    expected = {
        "weight": (rank, size),
        "bias": (rank,),
        "proj_weight": (rank, size),
        "R": (size, rank),
    }
    for name, tensor in numbers.items():
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)}, not {expected[name]}"
            )
