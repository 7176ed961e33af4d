"""Edits of several layers' hidden states, with one computation of their gradients.

Forward and backward, a layer replaces its edited rows and leaves what the parameters'
gradients need in a workspace. Once backward has been through all layers, the gradients
of all parameters are computed together: each layer takes an empty tensor, the anchor,
which one function of the parameters made, and which autograd calls last.

Torch's operations here; ``kernels/`` has the same in Triton.

Shapes: B batch, T tokens, S = B·T, L layers, I interventions of a layer (one, or one
each for prefix and suffix), C = I·R sources, N edited rows, D hidden size, R rank,
K = L·I interventions in all.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from axolotl_reft.core.affine import AffineStack, other_side
from axolotl_reft.core.interventions import without_autocast
from axolotl_reft.core.scatter import EditIndices, replace_rows, rows_at

# M (C, D), b (C,) and P (C, D) of a layer; None for what is not there.
Affine = tuple[Tensor | None, Tensor | None, Tensor | None]


class Workspace:
    """The parameters of a stack by layer, and the rows of a forward and a backward:
    ``taken_LND`` as they were, ``sources_LNC`` with Mh + b of them. Where it ``keeps``
    them, gradients of the parameters will be asked for.

    The interventions of a layer are one edit with C sources, of which a row keeps those
    of its side: one product of twice the rank takes less time than two.
    """

    def __init__(self, stack: AffineStack, layers: int) -> None:
        self.keeps = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in stack
        )
        self.layers, self.has_m = layers, stack.m_KRD is not None
        count, self.rank, self.width = stack.p_KRD.shape
        self.kept_sources = count // layers * self.rank
        m_LCD, b_LC, p_LCD = (
            [None] * layers
            if tensor is None
            else tensor.detach().unflatten(0, (layers, -1)).flatten(1, 2).unbind(0)
            for tensor in stack
        )
        self.stack: list[Affine] = list(zip(m_LCD, b_LC, p_LCD, strict=True))
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
        sources = self._new(
            h_BTD, (rooms, rows, self.kept_sources), dtype=torch.float32
        )
        self.sources_LNC = sources.expand(self.layers, -1, -1)
        # All rows are the hidden states themselves, which their layer hands in.
        own_rows = rows if self.keeps and indices is not None else 0
        self.taken_LND = self._new(h_BTD, (rooms, own_rows, self.width))

    @cached_property
    def _other_side_NC(self) -> Tensor | None:
        return other_side(self.rows, self.rank, self.sources_LNC.device)

    def grads(self) -> tuple[Tensor, Tensor]:
        """Return the room for this backward's gradients of the rows (L, N, D), and of
        their sources (L, N, C)."""
        backward = torch._C._current_graph_task_id()
        if self._grads is None or self._backward != backward:
            self._backward = backward
            taken, source = self.taken_LND, self.sources_LNC
            self._grads = self._new(taken, taken.shape), self._new(source, source.shape)
        return self._grads

    def edit(self, h_SD: Tensor, layer: int) -> Tensor:
        """Return hidden states with the layer's rows edited; notes what was edited."""
        if self.indices is None:
            self.taken_LND = h_SD.unsqueeze(0)
        taken_ND = self.taken_LND[layer] if self.keeps else None
        return self.add(h_SD, taken_ND, self.sources_LNC[layer], self.stack[layer])

    def edit_backward(
        self, grad_SD: Tensor, layer: int, to_input: bool
    ) -> Tensor | None:
        """Return the gradient of a layer's hidden states; notes those of its rows."""
        grads_LND, grad_sources_LNC = self.grads()
        if self.indices is None:
            grads_LND = grad_SD.unsqueeze(0)
            self._grads = grads_LND, grad_sources_LNC
        grad_ND = grads_LND[layer] if self.keeps else None
        m_CD, _, p_CD = self.stack[layer]
        back = p_CD, None, m_CD if to_input else None
        out_SD = self.add(grad_SD, grad_ND, grad_sources_LNC[layer], back)
        return out_SD if to_input else None

    def add(
        self, x_SD: Tensor, taken_ND: Tensor | None, source_NC: Tensor, affine: Affine
    ) -> Tensor:
        """Return x + Pᵀ(Mx + b) in the edited rows, and x in the others.

        Backward, x is a gradient, and P, nothing and M are in the places of M, b and P.
        The rows of x go to ``taken_ND``, if it is given, and Mx + b to ``source_NC``.
        """
        rows_ND, (m_CD, b_C, p_CD) = x_SD, affine
        if self.indices is not None:
            rows_ND = rows_at(x_SD, *self._where, out=taken_ND)
        rows_ND = rows_ND.float()
        if m_CD is not None and b_C is not None:
            torch.addmm(b_C, rows_ND, m_CD.T, out=source_NC)
        elif m_CD is not None:
            torch.mm(rows_ND, m_CD.T, out=source_NC)
        elif b_C is not None:
            source_NC.copy_(b_C)
        if self._other_side_NC is not None:
            source_NC.masked_fill_(self._other_side_NC, 0)
        if p_CD is None:
            return x_SD
        new_ND = torch.addmm(rows_ND, source_NC, p_CD).to(x_SD.dtype)
        if self.indices is not None:
            new_ND = replace_rows(x_SD, new_ND, *self._where)
        return new_ND

    def parameter_gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of M (L·I, R, D), b (L·I, R) and P (L·I, R, D)."""
        (grads_LND, grad_sources_LNC), self._grads = self.grads(), None
        grad_m = grad_sources_LNC.mT @ self.taken_LND.float() if self.has_m else None
        grad_p = self.sources_LNC.mT @ grads_LND.float()
        each = grad_m, grad_sources_LNC.sum(1), grad_p
        sizes = -1, self.rank
        return tuple(
            None if grad is None else grad.unflatten(1, sizes).flatten(0, 1)
            for grad in each
        )


class StackedEdits:
    """The edits of L layers in one forward, by a stack of L·I interventions, layer by
    layer; the workspace is of torch's operations, or a subclass with kernels."""

    def __init__(
        self, stack: AffineStack, layers: int, workspace: type[Workspace] = Workspace
    ) -> None:
        self._workspace = workspace(stack, layers)
        self._anchor = _Parameters.apply(self._workspace, *stack)
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
        return _EditLayer.apply(h_BTD, self._anchor, self._workspace, layer)


def _like(h_BTD: Tensor) -> tuple[Any, ...]:
    return h_BTD.dtype, h_BTD.device, h_BTD.numel()


class _Parameters(torch.autograd.Function):
    """Makes the layers' anchor from M, b and P; its backward has their gradients."""

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
        with without_autocast(ctx.workspace.sources_LNC.device):
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
