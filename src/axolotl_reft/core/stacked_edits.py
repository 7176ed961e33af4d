"""Edits of several layers' hidden states, with one computation of their gradients.

Forward and backward, a layer replaces its edited rows and leaves what the parameters'
gradients need in a workspace. Once backward has been through all layers, the gradients
of all parameters are computed together: each layer has a token for an input, which one
function of the parameters made, and which autograd therefore calls last.

The three steps are torch's operations here, and Triton's kernels in ``kernels/``.

Shapes: B batch, T tokens, S = B·T, L layers, I interventions of a layer (one, or one
each for prefix and suffix), N edited rows of a layer, D hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from axolotl_reft.core.affine import AffineStack, affine_rows
from axolotl_reft.core.interventions import without_autocast
from axolotl_reft.core.scatter import EditIndices, replace_rows, rows_at


class Workspace:
    """The parameters of a stack by layer, and the rows of a forward and a backward.

    Attributes:
        keeps: gradients of the parameters will be asked for.
        indices: the edited rows of each intervention; None for all rows.
        taken_LND: the rows as they were.
        sources_LNR: Mh + b.
    """

    def __init__(self, stack: AffineStack, layers: int) -> None:
        parameters = (stack.m_KRD, stack.b_KR, stack.p_KRD)
        self.keeps = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in parameters
        )
        self.layers = layers
        m_KRD, b_KR, p_KRD = (
            None if tensor is None else tensor.detach() for tensor in parameters
        )
        assert b_KR is not None and p_KRD is not None
        _, self.rank, self.width = p_KRD.shape
        self.b_LIR = b_KR.unflatten(0, (layers, -1)).unbind(0)
        self.p_LIRD = p_KRD.unflatten(0, (layers, -1)).unbind(0)
        self.m_LIRD: Sequence[Tensor | None] = [None] * layers
        if m_KRD is not None:
            self.m_LIRD = m_KRD.unflatten(0, (layers, -1)).unbind(0)
        self._backward = -1
        self._grads: tuple[Tensor, Tensor] | None = None

    def open(self, h_BTD: Tensor, indices: EditIndices | None) -> None:
        """Make room for the rows, now that it is known which they are."""
        self.indices = indices
        if indices is not None:
            self._where = indices.all_N, indices.may_be_unused
        self.tokens = h_BTD.numel() // self.width
        self.rows = [self.tokens] if indices is None else indices.sizes
        rows = sum(self.rows)
        # Zeros where a forward or a backward may leave some of the layers out; without
        # gradients the layers take turns in the room of one.
        self._new = torch.zeros if self.layers > 1 else torch.empty
        rooms = self.layers if self.keeps else 1
        self.sources_LNR = self._new(
            (rooms, rows, self.rank), dtype=torch.float32, device=h_BTD.device
        )
        # All rows are the hidden states themselves, which their layer hands in.
        own_rows = rows if self.keeps and indices is not None else 0
        self.taken_LND = self._new(
            (rooms, own_rows, self.width), dtype=h_BTD.dtype, device=h_BTD.device
        )

    def room(self, layer: int) -> int:
        """Return the layer's place among the rows."""
        return layer if self.keeps else 0

    def grads(self) -> tuple[Tensor, Tensor]:
        """Return the room for this backward's gradients of the rows (L, N, D), and of
        their sources (L, N, R)."""
        backward = torch._C._current_graph_task_id()
        if self._grads is None or self._backward != backward:
            self._backward = backward
            shape_LND, device = self.taken_LND.shape, self.taken_LND.device
            dtype = self.taken_LND.dtype
            self._grads = (
                self._new(shape_LND, dtype=dtype, device=device),
                self._new(self.sources_LNR.shape, dtype=torch.float32, device=device),
            )
        return self._grads

    def edit(self, h_SD: Tensor, layer: int) -> Tensor:
        """Return hidden states with the layer's rows edited; notes what was edited."""
        place = self.room(layer)
        if self.indices is None:
            rows_ND = h_SD
            self.taken_LND = h_SD.unsqueeze(0)
        else:
            taken_ND = self.taken_LND[place] if self.keeps else None
            rows_ND = rows_at(h_SD, *self._where, out=taken_ND)
        rows_ND = rows_ND.float()
        m_IRD, b_IR, p_IRD = self.m_LIRD[layer], self.b_LIR[layer], self.p_LIRD[layer]
        sources_NR, start, edited = self.sources_LNR[place], 0, []
        for side, count in enumerate(self.rows):
            h_ND, end = rows_ND[start : start + count], start + count
            if m_IRD is None:
                sources_NR[start:end] = b_IR[side]
                edited.append(affine_rows(h_ND, None, b_IR[side], p_IRD[side]))
            else:
                source_NR = sources_NR[start:end]
                torch.addmm(b_IR[side], h_ND, m_IRD[side].T, out=source_NR)
                edited.append(torch.addmm(h_ND, source_NR, p_IRD[side]))
            start = end
        new_ND = edited[0] if len(edited) == 1 else torch.cat(edited)
        if self.indices is None:
            return new_ND.to(h_SD.dtype)
        return replace_rows(h_SD, new_ND.to(h_SD.dtype), *self._where)

    def edit_backward(
        self, grad_SD: Tensor, layer: int, to_input: bool, to_parameters: bool
    ) -> Tensor | None:
        """Return the gradient of a layer's hidden states; notes those of its rows."""
        m_IRD, p_IRD = self.m_LIRD[layer], self.p_LIRD[layer]
        grads_LND, grad_sources_LNR = self.grads()
        if self.indices is None:
            grad_ND = grad_SD
            self._grads = grad_SD.unsqueeze(0), grad_sources_LNR
        else:
            out_ND = grads_LND[layer] if to_parameters else None
            grad_ND = rows_at(grad_SD, *self._where, out=out_ND)
        grad_ND = grad_ND.float()
        place, start, passed = self.room(layer), 0, []
        for side, count in enumerate(self.rows):
            g_ND, end = grad_ND[start : start + count], start + count
            grad_source_NR = grad_sources_LNR[place, start:end]
            torch.mm(g_ND, p_IRD[side].T, out=grad_source_NR)
            if to_input and m_IRD is not None:
                passed.append(torch.addmm(g_ND, grad_source_NR, m_IRD[side]))
            start = end
        if not to_input:
            return None
        if not passed:
            return grad_SD
        passed_ND = passed[0] if len(passed) == 1 else torch.cat(passed)
        if self.indices is None:
            return passed_ND.to(grad_SD.dtype)
        return replace_rows(grad_SD, passed_ND.to(grad_SD.dtype), *self._where)

    def parameter_gradients(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the gradients of M (L·I, R, D), b (L·I, R) and P (L·I, R, D)."""
        (grads_LND, grad_sources_LNR), self._grads = self.grads(), None
        grad_m, grad_b, grad_p = [], [], []
        start = 0
        for count in self.rows:
            part = slice(start, start + count)
            grad_source_LNR = grad_sources_LNR[:, part]
            grad_b.append(grad_source_LNR.sum(1))
            grad_p.append(self.sources_LNR[:, part].mT @ grads_LND[:, part].float())
            if self.m_LIRD[0] is not None:
                taken_LND = self.taken_LND[:, part].float()
                grad_m.append(grad_source_LNR.mT @ taken_LND)
            start += count
        return (
            (_by_layer(grad_m) if grad_m else None),
            _by_layer(grad_b),
            _by_layer(grad_p),
        )


def _by_layer(sides: list[Tensor]) -> Tensor:
    """Lay tensors (L, …) of each side out as (L·I, …)."""
    return sides[0] if len(sides) == 1 else torch.stack(sides, 1).flatten(0, 1)


class StackedEdits:
    """The edits of L layers by the interventions of one stack, in one forward.

    Args:
        stack: of L·I interventions, layer by layer.
        layers: L.
        workspace: of torch's operations, or of a subclass with kernels.
    """

    def __init__(
        self, stack: AffineStack, layers: int, workspace: type[Workspace] = Workspace
    ) -> None:
        self.layers = layers
        self._workspace = workspace(stack, layers)
        self._token = _Parameters.apply(
            self._workspace, stack.m_KRD, stack.b_KR, stack.p_KRD
        )
        self._like: tuple[Any, ...] | None = None

    def fits(self, h_BTD: Tensor) -> bool:
        """Whether these hidden states are of the kind that the first layer had."""
        return self._like in (None, _like(h_BTD))

    def edit(self, layer: int, h_BTD: Tensor, indices: EditIndices | None) -> Tensor:
        """Return the hidden states of a layer, edited; once for each layer.

        Args:
            layer: from 0 to L − 1.
            indices: the same for all layers; None for every row.
        """
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
        ctx: Any,
        workspace: Workspace,
        m_KRD: Tensor | None,
        b_KR: Tensor,
        p_KRD: Tensor,
    ) -> Tensor:
        ctx.workspace = workspace
        ctx.set_materialize_grads(False)
        return b_KR.new_empty(0)

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
            h_SD = h_BTD.reshape(-1, h_BTD.shape[-1])
            out_SD = workspace.edit(h_SD, layer)
        # Not a view to autograd, which refuses changes in place to a Function's views.
        return torch.ops.aten._unsafe_view(out_SD, h_BTD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        to_input, to_parameters, *_ = ctx.needs_input_grad
        with without_autocast(grad_BTD.device):
            grad_SD = grad_BTD.reshape(-1, grad_BTD.shape[-1])
            passed_SD = ctx.workspace.edit_backward(
                grad_SD, ctx.layer, to_input, to_parameters
            )
        passed = None if passed_SD is None else passed_SD.view(grad_BTD.shape)
        # None for the token: that there is one is what makes autograd go on to it.
        return passed, None, None, None
