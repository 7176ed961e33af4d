"""The edit h + Pᵀ(Mh + b), on the stacked parameters of several interventions.

All six kinds are this edit while their source is linear: P is R or W₂, and M is W − P,
W, −P or nothing (``kinds.py``). Torch only.

Shapes: K interventions, N rows, D hidden size, R rank, C = K·R of one layer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_reft.core.rotation import rotations


class AffineStack(NamedTuple):
    """M, b and P of K interventions of one kind, width and rank, in float32; M is None
    where the kind does not read the hidden state."""

    m_KRD: Tensor | None
    b_KR: Tensor
    p_KRD: Tensor


def affine_stack(interventions: Sequence[Any]) -> AffineStack:
    """Stack the parameters of interventions of one kind, width and rank."""
    kind = interventions[0].kind
    p_KRD = projections(interventions)
    b_KR = _stacked(interventions, "bias")
    m_KRD = _stacked(interventions, "weight") if kind.has_weight else None
    if kind.subtracts:
        m_KRD = -p_KRD if m_KRD is None else m_KRD - p_KRD
    return AffineStack(m_KRD, b_KR, p_KRD)


def projections(interventions: Sequence[Any]) -> Tensor:
    """Stack P (K, R, D), which is R or W₂, of interventions of one kind."""
    if not interventions[0].kind.has_rotation:
        return _stacked(interventions, "proj_weight")
    bases = [module._buffers["rotation_base"] for module in interventions]
    vectors = [module._parameters["rotation"].float() for module in interventions]
    return rotations(vectors, bases)


def _stacked(interventions: Sequence[Any], name: str) -> Tensor:
    # Past nn.Module's getattr: there may be hundreds, in every step. A sharded model
    # lends its parameters in the dtype of its mixed precision.
    return torch.stack([module._parameters[name] for module in interventions]).float()


def affine_rows(
    h_ND: Tensor, stack: AffineStack, other_side_NC: Tensor | None = None
) -> Tensor:
    """Return h + Pᵀ(Mh + b) for rows in float32, by the interventions of one layer: one
    product for both, of which a row keeps its side's part (:func:`other_side`)."""
    p_CD, b_C = stack.p_KRD.flatten(0, 1), stack.b_KR.flatten()
    source_NC = b_C.expand(h_ND.shape[0], -1)
    if stack.m_KRD is not None:
        source_NC = F.linear(h_ND, stack.m_KRD.flatten(0, 1), b_C)
    if other_side_NC is not None:
        source_NC = source_NC.masked_fill(other_side_NC, 0)
    return torch.addmm(h_ND, source_NC, p_CD)


def other_side(rows: Sequence[int], rank: int, device: torch.device) -> Tensor | None:
    """Return which sources (N, 2R) of each row are the other intervention's, where
    so many ``rows`` of each side are concatenated; None for one side."""
    if len(rows) == 1:
        return None
    rows_N1 = torch.arange(sum(rows), device=device).unsqueeze(1)
    return (rows_N1 < rows[0]) ^ (torch.arange(2 * rank, device=device) < rank)


class StackCache:
    """Keeps a stack while its tensors stay as they were; in eval mode, without grad.

    torch's version counters miss changes through ``.data``, which training makes, so a
    stack is also rebuilt after ``train()`` or ``eval()``, and while a gradient is set.
    """

    def __init__(self) -> None:
        self._kept: tuple[list[int], list[Tensor], AffineStack] | None = None

    def get(self, interventions: Sequence[Any]) -> AffineStack:
        """Return the stack of these interventions."""
        state = _kept_state(interventions)
        if state is None:
            self._kept = None
            return affine_stack(interventions)
        if self._kept is None or self._kept[0] != state[0]:
            self._kept = *state, affine_stack(interventions)
        return self._kept[2]

    def __reduce__(self) -> tuple[type[StackCache], tuple[()]]:
        return type(self), ()  # a copy or a pickle keeps nothing


def _kept_state(interventions: Sequence[Any]) -> tuple[list[int], list[Tensor]] | None:
    """Return what shows that a tensor has changed, and the tensors themselves, so that
    no other gets the id of one; None where a stack must not be kept."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    state: list[int] = []
    tensors: list[Tensor] = []
    for module in interventions:
        if module.training:
            return None
        state.append(module.mode_changes)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor.grad is not None or tensor.is_inference():
                return None
            state += (id(tensor), tensor._version, tensor.data_ptr())
            tensors.append(tensor)
    return state, tensors
