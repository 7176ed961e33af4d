"""Imports pyreft; converts interventions to its objects, and its state dicts to ours.

pyreft cannot be a declared dependency: its pins (transformers 4.45.1 and notebook
packages) contradict axolotl's, so it is installed with ``--no-deps``.

Shapes: D width of the edited hidden state, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import StringIO
from types import ModuleType

import torch
from torch import Tensor, nn

from axolotl_reft.core.interventions import Intervention
from axolotl_reft.core.kinds import KINDS
from axolotl_reft.core.rotation import (
    ORTHONORMALITY_TOLERANCE,
    compact_base,
    rotation,
    square_base,
)
from axolotl_reft.core.tensors import check_tensors

PYREFT_VERSION = "0.1.0"
INSTALL_COMMAND = f"pip install --no-deps pyreft=={PYREFT_VERSION}"
# Our names of the tensors in pyreft's state dicts. LoReFT's holds R itself; the others'
# hold torch's parametrization, vectors and a base (D, D).
_VECTORS = "rotate_layer.parametrizations.weight.original"
_BASE = "rotate_layer.parametrizations.weight.0.base"
_AFFINE = {"learned_source.weight": "weight", "learned_source.bias": "bias"}
_NAMES = {
    "loreft": {"weight": "weight", "bias": "bias", "rotate_layer": "rotation"},
    "noreft": {**_AFFINE, "proj_layer.weight": "proj_weight"},
    "direft": {**_AFFINE, "proj_layer.weight": "proj_weight"},
    "orthogonal_direft": {**_AFFINE, _VECTORS: "rotation"},
    "consreft": {"learned_source": "bias", _VECTORS: "rotation"},
    "lobireft": {"learned_source": "bias", _VECTORS: "rotation"},
}
# The same for the parameters of pyreft's objects, rotations apart.
_PARAMETERS = _NAMES["noreft"] | {"learned_source": "bias"}


def import_pyreft() -> ModuleType:
    """Import pyreft, or raise ValueError that says what to install."""
    try:
        if (found := version("pyreft")) != PYREFT_VERSION:
            raise _unusable(f"version {found} is installed")
    except PackageNotFoundError:
        raise _unusable("it is not installed") from None
    if find_spec("pyvene") is None:
        raise _unusable("pyvene, which it is built on, is not installed")
    try:
        # pyvene prints what it would like to have installed.
        with redirect_stdout(StringIO()):
            import pyreft
    except Exception as error:  # pyvene's imports can fail in their own ways
        raise _unusable(f"importing it failed: {error}") from error
    return pyreft


def _unusable(reason: str) -> ValueError:
    return ValueError(
        f"exchange with pyreft needs pyreft {PYREFT_VERSION}, and {reason}. Install it "
        "without its dependencies, whose pins contradict axolotl's, and pyvene:\n\n"
        f"    {INSTALL_COMMAND}\n    pip install 'pyvene>=0.1.8,<0.2'\n"
    )


@torch.no_grad()
def make_pyreft_object(
    intervention: str, ours: Intervention, act_fn: str | None, dropout: float
) -> nn.Module:
    """Build pyreft's object with the parameters of ours, in float32.

    A rotation gets the same base and vectors, so that training goes on the same.
    """
    theirs = getattr(import_pyreft(), KINDS[intervention].pyreft_class)(
        embed_dim=ours.hidden_size,
        low_rank_dimension=ours.rank,
        dtype=torch.float32,
        add_bias=False,
        act_fn=act_fn,
        dropout=dropout,
    )
    tensors = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    for name, our_name in _PARAMETERS.items():
        if name in tensors:
            tensors[name].copy_(getattr(ours, our_name))
    if KINDS[intervention].has_rotation:
        unit_DR = torch.zeros_like(ours.rotation).fill_diagonal_(1)
        tensors[_VECTORS].copy_(ours.rotation.tril(-1) - unit_DR)
        tensors[_BASE].copy_(square_base(ours.get_buffer("rotation_base")))
    return theirs


def read_pyreft_state(
    intervention: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Convert the state dict of one of pyreft's objects to ours, in float32.

    Reads LoReFT's as ``noreft`` too, which computes the same for any R.

    Raises:
        ValueError: a tensor is missing, unexpected, not finite or of a wrong shape, or
            R is not orthonormal.
    """
    pyvenes = ("embed_dim", "interchange_dim")
    state = {k: tensor.float() for k, tensor in state.items() if k not in pyvenes}
    if "proj_layer.bias" in state:
        raise ValueError(
            "'proj_layer.bias': it was trained with add_bias=True; train it without"
        )
    kind, names = KINDS[intervention], _NAMES[intervention]
    if intervention == "noreft" and "rotate_layer" in state:
        names = _NAMES["loreft"] | {"rotate_layer": "proj_weight"}
        state["rotate_layer"] = state["rotate_layer"].transpose(0, -1)
    ours = {name: state[theirs] for theirs, name in names.items() if theirs in state}
    width, rank = kind.sizes(ours)
    shapes = kind.expected_shapes(width, rank)
    expected = {theirs: shapes[name] for theirs, name in names.items()}
    if _VECTORS in expected:
        expected[_BASE] = (width, width)
    check_tensors(state, expected, f"pyreft's {kind.pyreft_class}")
    if kind.has_rotation:
        r_DR = ours["rotation"]
        if _VECTORS in expected:
            # As torch's parametrization computes it. It multiplies by whole numbers:
            # after a step of weight decay the diagonal is zero, and with it R.
            q_DR = rotation(r_DR, compact_base(torch.eye(width, rank)))
            r_DR = state[_BASE] @ (q_DR * -r_DR.diagonal().int())
        _check_orthonormal(r_DR, intervention)
        ours["rotation"] = torch.zeros_like(r_DR)
        ours["rotation_base"] = compact_base(r_DR)
    return ours


def _check_orthonormal(r_DR: Tensor, intervention: str) -> None:
    remedy = "train it again"
    if intervention == "loreft":
        remedy = "the same function without the constraint is --intervention noreft"
    if not r_DR.any():
        raise ValueError(
            "the rotation is zero, as weight decay leaves pyreft's, and edits "
            f"nothing; train without weight decay, or {remedy}"
        )
    error = (r_DR.T @ r_DR - torch.eye(r_DR.shape[1])).abs().max().item()
    if error > ORTHONORMALITY_TOLERANCE:
        raise ValueError(
            f"the rotation is not orthonormal (off by {error:.3f}), as pyreft's are "
            f"after it resumed a training (stanfordnlp/pyreft#179); {remedy}"
        )
