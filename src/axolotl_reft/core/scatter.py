"""Some rows of a tensor replaced by functions of themselves, for one copy.

``index_select``, ``index_copy`` and their derivatives would pass over the whole tensor
three more times in backward: to clear the gradient where it was overwritten, to lay the
new one out among zeros, and to add the two. Torch only.

Shapes: B batch, T tokens, S = B·T, N edited rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class EditIndices:
    """Flat indices into S of the rows that each intervention of a layer edits.

    Args:
        sides: one (N,) tensor for each intervention, no index twice; ``all_N`` has them
            one after the other, and ``sizes`` how many there are of each.
        may_be_unused: slots were reserved, and S itself, one past the end, marks those
            that are not used.
    """

    def __init__(self, sides: tuple[Tensor, ...], may_be_unused: bool = False) -> None:
        self.sides, self.may_be_unused = sides, may_be_unused
        self.all_N = sides[0] if len(sides) == 1 else torch.cat(sides)
        self.sizes = [index_N.shape[0] for index_N in sides]

    def to(self, device: torch.device) -> EditIndices:
        """Return the same on a device."""
        if self.all_N.device == device:
            return self
        sides = tuple(index_N.to(device) for index_N in self.sides)
        return EditIndices(sides, self.may_be_unused)


def edit(
    h_BTD: Tensor,
    indices: EditIndices,
    interventions: Sequence[Callable[[Tensor], Tensor]],
) -> Tensor:
    """Return hidden states with the rows (N, D) at ``indices`` replaced by their edits,
    of one intervention for each side or one for all of them."""
    flat_SD = h_BTD.reshape(-1, h_BTD.shape[-1])
    where = indices.all_N.to(flat_SD.device), indices.may_be_unused
    rows_ND, rest_SD = _Take.apply(flat_SD, *where)
    if len(interventions) == 1:
        new_ND = interventions[0](rows_ND)
    else:
        sides = zip(rows_ND.split(indices.sizes), interventions, strict=True)
        new_ND = torch.cat([intervention(rows) for rows, intervention in sides])
    # FSDP's mixed precision may have chosen another dtype for what comes out.
    new_ND = new_ND.to(flat_SD.dtype)
    return _Put.apply(rest_SD, new_ND, *where).view(h_BTD.shape)


class _Take(torch.autograd.Function):
    """The rows at an index, and the tensor itself for :class:`_Put`, which replaces
    them: the gradient that comes back for those rows is overwritten."""

    @staticmethod
    def forward(
        ctx: Any, flat_SD: Tensor, index_N: Tensor, may_be_unused: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index_N)
        ctx.may_be_unused = may_be_unused
        return rows_at(flat_SD, index_N, may_be_unused), flat_SD.view_as(flat_SD)

    @staticmethod
    def backward(
        ctx: Any, grad_rows_ND: Tensor, grad_rest_SD: Tensor
    ) -> tuple[Tensor, None, None]:
        (index_N,) = ctx.saved_tensors
        grad_SD = replace_rows(grad_rest_SD, grad_rows_ND, index_N, ctx.may_be_unused)
        return grad_SD, None, None


class _Put(torch.autograd.Function):
    """The tensor with other rows at an index."""

    @staticmethod
    def forward(
        ctx: Any, rest_SD: Tensor, new_ND: Tensor, index_N: Tensor, may_be_unused: bool
    ) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.may_be_unused = may_be_unused
        return replace_rows(rest_SD, new_ND, index_N, may_be_unused)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (index_N,) = ctx.saved_tensors
        return grad_SD, rows_at(grad_SD, index_N, ctx.may_be_unused), None, None


def rows_at(
    flat_SD: Tensor, index_N: Tensor, may_be_unused: bool, out: Tensor | None = None
) -> Tensor:
    """Return the rows at an index (N, D); zeros for unused slots."""
    if not may_be_unused:
        return torch.index_select(flat_SD, 0, index_N, out=out)
    last = flat_SD.shape[0] - 1
    rows_ND = torch.index_select(flat_SD, 0, index_N.clamp(max=last), out=out)
    return rows_ND.masked_fill_((index_N > last).unsqueeze(1), 0)


def replace_rows(
    flat_SD: Tensor, rows_ND: Tensor, index_N: Tensor, may_be_unused: bool
) -> Tensor:
    """Return a copy with these rows at an index."""
    if not may_be_unused:
        return flat_SD.index_copy(0, index_N, rows_ND)
    # Unused slots write past the end.
    size, width = flat_SD.shape
    padded = flat_SD.new_empty(size + 1, width)
    padded[:-1].copy_(flat_SD)
    padded.index_copy_(0, index_N, rows_ND)
    # Not a view to autograd, which refuses changes in place to a Function's views.
    return torch.ops.aten._unsafe_view(padded[:-1], [size, width])
