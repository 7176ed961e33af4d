"""Edits of several layers' hidden states, with one computation of their gradients.

Forward and backward, a layer replaces its edited rows and leaves what the parameters'
gradients need in a workspace. Once backward has been through all layers, the gradients
of all parameters are computed together: each layer has a token for an input, which one
function of the parameters made, and which autograd therefore calls last.

Torch's operations here; ``kernels/`` has the same in Triton.

Shapes: B batch, T tokens, S = B·T, L layers, I interventions of a layer (one, or one
each for prefix and suffix), N edited rows of a layer, D hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from axolotl_reft.core.affine import AffineStack
from axolotl_reft.core.interventions import without_autocast
from axolotl_reft.core.scatter import EditIndices, replace_rows, rows_at

# M, b and P of each intervention of a layer; None for what is not there.
Sides = Sequence[tuple[Tensor | None, Tensor | None, Tensor | None]]


class Workspace:
    """The parameters of a stack by layer, and the rows of a forward and a backward:
    ``taken_LND`` as they were, ``sources_LNR`` with Mh + b of them. Where it ``keeps``
    them, gradients of the parameters will be asked for."""

    def __init__(self, stack: AffineStack, layers: int) -> None:
        self.keeps = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in stack
        )
        self.layers, self.has_m = layers, stack.m_KRD is not None
        count, self.rank, self.width = stack.p_KRD.shape
        parts = [[None] * count if t is None else t.detach().unbind(0) for t in stack]
        sides, every = count // layers, list(zip(*parts, strict=True))
        self.sides = [every[at : at + sides] for at in range(0, count, sides)]
        self._new = Tensor.new_zeros if layers > 1 else Tensor.new_empty
        self._backward = -1
        self._grads: tuple[Tensor, Tensor] | None = None

    def open(self, h_BTD: Tensor, indices: EditIndices | None) -> None:
        """Make room for the rows, now that it is known which they are."""
        self.indices = indices
        self.tokens = h_BTD.numel() // self.width
        self.rows = [self.tokens]
        if indices is not None:
            self._where = indices.all_N, indices.may_be_unused
            self.rows = indices.sizes
        # Zeros where a forward or a backward may leave some of the layers out; without
        # gradients the layers take turns in the room of one.
        rooms, rows = self.layers if self.keeps else 1, sum(self.rows)
        shape = rooms, rows, self.rank
        self.sources_LNR = self._new(h_BTD, shape, dtype=torch.float32)
        if not self.keeps:
            self.sources_LNR = self.sources_LNR.expand(self.layers, -1, -1)
        # All rows are the hidden states themselves, which their layer hands in.
        own_rows = rows if self.keeps and indices is not None else 0
        self.taken_LND = self._new(h_BTD, (rooms, own_rows, self.width))

    def grads(self) -> tuple[Tensor, Tensor]:
        """Return the room for this backward's gradients of the rows (L, N, D), and of
        their sources (L, N, R)."""
        backward = torch._C._current_graph_task_id()
        if self._grads is None or self._backward != backward:
            self._backward = backward
            taken, source = self.taken_LND, self.sources_LNR
            self._grads = self._new(taken, taken.shape), self._new(source, source.shape)
        return self._grads

    def edit(self, h_SD: Tensor, layer: int) -> Tensor:
        """Return hidden states with the layer's rows edited; notes what was edited."""
        if self.indices is None:
            self.taken_LND = h_SD.unsqueeze(0)
        taken_ND = self.taken_LND[layer] if self.keeps else None
        return self.add(h_SD, taken_ND, self.sources_LNR[layer], self.sides[layer])

    def edit_backward(
        self, grad_SD: Tensor, layer: int, to_input: bool
    ) -> Tensor | None:
        """Return the gradient of a layer's hidden states; notes those of its rows."""
        grads_LND, grad_sources_LNR = self.grads()
        if self.indices is None:
            grads_LND = grad_SD.unsqueeze(0)
            self._grads = grads_LND, grad_sources_LNR
        grad_ND = grads_LND[layer] if self.keeps else None
        sides = [(p, None, m if to_input else None) for m, _, p in self.sides[layer]]
        out_SD = self.add(grad_SD, grad_ND, grad_sources_LNR[layer], sides)
        return out_SD if to_input else None

    def add(
        self, x_SD: Tensor, taken_ND: Tensor | None, source_NR: Tensor, sides: Sides
    ) -> Tensor:
        """Return x + Pᵀ(Mx + b) in the edited rows, and x in the others.

        Backward, x is a gradient, and P, nothing and M are in the places of M, b and P.
        The rows of x go to ``taken_ND``, if it is given, and Mx + b to ``source_NR``.
        """
        rows_ND = x_SD
        if self.indices is not None:
            rows_ND = rows_at(x_SD, *self._where, out=taken_ND)
        parts = rows_ND.float().split(self.rows), source_NR.split(self.rows)
        edited = []
        for x_ND, to_NR, (m_RD, b_R, p_RD) in zip(*parts, sides, strict=True):
            if m_RD is not None and b_R is not None:
                torch.addmm(b_R, x_ND, m_RD.T, out=to_NR)
            elif m_RD is not None:
                torch.mm(x_ND, m_RD.T, out=to_NR)
            elif b_R is not None:
                to_NR.copy_(b_R)
            if p_RD is not None:
                edited.append(torch.addmm(x_ND, to_NR, p_RD))
        if not edited:
            return x_SD
        new_ND = edited[0] if len(edited) == 1 else torch.cat(edited)
        new_ND = new_ND.to(x_SD.dtype)
        if self.indices is not None:
            new_ND = replace_rows(x_SD, new_ND, *self._where)
        return new_ND

    def parameter_gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of M (L·I, R, D), b (L·I, R) and P (L·I, R, D)."""
        (grads_LND, grad_sources_LNR), self._grads = self.grads(), None
        rooms = self.taken_LND, self.sources_LNR, grads_LND, grad_sources_LNR
        sides = zip(*[room.split(self.rows, 1) for room in rooms], strict=True)
        grad_m, grad_b, grad_p = [], [], []
        for taken_LND, source_LNR, grad_LND, grad_source_LNR in sides:
            if self.has_m:
                grad_m.append(grad_source_LNR.mT @ taken_LND.float())
            grad_b.append(grad_source_LNR.sum(1))
            grad_p.append(source_LNR.mT @ grad_LND.float())
        return _by_layer(grad_m), _by_layer(grad_b), _by_layer(grad_p)


def _by_layer(sides: list[Tensor]) -> Tensor | None:
    """Lay tensors (L, …) of each side out as (L·I, …)."""
    if len(sides) < 2:
        return sides[0] if sides else None
    return torch.stack(sides, 1).flatten(0, 1)


class StackedEdits:
    """The edits of L layers in one forward, by a stack of L·I interventions, layer by
    layer; the workspace is of torch's operations, or a subclass with kernels."""

    def __init__(
        self, stack: AffineStack, layers: int, workspace: type[Workspace] = Workspace
    ) -> None:
        self._workspace = workspace(stack, layers)
        self._token = _Parameters.apply(self._workspace, *stack)
        self._like: tuple[Any, ...] | None = None

    def fits(self, h_BTD: Tensor) -> bool:
        """Whether these hidden states are of the kind that the first layer had."""
        return self._like in (None, _like(h_BTD))

    def edit(self, layer: int, h_BTD: Tensor, indices: EditIndices | None) -> Tensor:
        """Return the hidden states of a layer, from 0 to L − 1, edited; once for each,
        and at the same indices for all, or in every row."""
        if self._like is None:
            self._like = _like(h_BTD)
            self._workspace.open(h_BTD, indices)
        return _EditLayer.apply(h_BTD, self._token, self._workspace, layer)


def _like(h_BTD: Tensor) -> tuple[Any, ...]:
    return h_BTD.dtype, h_BTD.device, h_BTD.numel()


class _Parameters(torch.autograd.Function):
    """Makes the layers' token from M, b and P; its backward has their gradients."""

    @staticmethod
    def forward(
        ctx: Any, workspace: Workspace, m: Tensor | None, b: Tensor, p: Tensor
    ) -> Tensor:
        ctx.workspace = workspace
        ctx.set_materialize_grads(False)
        return b.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        with without_autocast(ctx.workspace.sources_LNR.device):
            return None, *ctx.workspace.parameter_gradients()


class _EditLayer(torch.autograd.Function):
    """One layer's hidden states with h + Pᵀ(Mh + b) in the edited rows."""

    @staticmethod
    def forward(
        ctx: Any, h_BTD: Tensor, token: Tensor, workspace: Workspace, layer: int
    ) -> Tensor:
        ctx.workspace, ctx.layer = workspace, layer
        with without_autocast(h_BTD.device):
            out_SD = workspace.edit(h_BTD.flatten(0, -2), layer)
        # Not a view to autograd, which refuses changes in place to a Function's views.
        return torch.ops.aten._unsafe_view(out_SD, h_BTD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad_BTD.device):
            grad_SD, to_input = grad_BTD.flatten(0, -2), ctx.needs_input_grad[0]
            passed = ctx.workspace.edit_backward(grad_SD, ctx.layer, to_input)
        if passed is not None:
            passed = passed.view(grad_BTD.shape)
        # None for the token: that there is one is what makes autograd go on to it.
        return passed, None, None, None
