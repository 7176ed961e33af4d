"""Some vectors of a tensor replaced by functions of themselves, for one copy.

The same as ``index_select``, ``index_copy`` and their derivatives, which would pass
over the whole tensor three more times in backward: to clear the gradient where it was
overwritten, to lay the new one out among zeros, and to add the two. Torch only.

Shapes: B batch, T tokens, S = B·T, N edited positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def edit(
    h_BTD: Tensor,
    indices: Sequence[Tensor],
    interventions: Sequence[Callable[[Tensor], Tensor]],
) -> Tensor:
    """Hidden states with the vectors at ``indices`` replaced by their edits.

    Args:
        h_BTD: hidden states; not changed in place.
        indices: one (N,) tensor of flat indices into B·T per intervention, no index
            twice; B·T itself, one past the end, marks an unused slot.
        interventions: as many, called with (N, D).
    """
    flat_SD = h_BTD.reshape(-1, h_BTD.shape[-1])
    sizes = [index.shape[0] for index in indices]
    index_N = indices[0] if len(indices) == 1 else torch.cat(list(indices))
    index_N = index_N.to(flat_SD.device)
    rows_ND, rest_SD = _Take.apply(flat_SD, index_N)
    new_ND = torch.cat(
        [
            intervention(rows)
            for rows, intervention in zip(
                rows_ND.split(sizes), interventions, strict=True
            )
        ]
    )
    # FSDP's mixed precision may have chosen another dtype for what comes out.
    new_ND = new_ND.to(flat_SD.dtype)
    return _Put.apply(rest_SD, new_ND, index_N).view(h_BTD.shape)


class _Take(torch.autograd.Function):
    """The rows at an index, and the tensor itself for :class:`_Put`, which replaces
    them: what comes back to it as the gradient of those rows counts for nothing."""

    @staticmethod
    def forward(ctx: Any, flat_SD: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index_N)
        return rows_at(flat_SD, index_N), flat_SD.view_as(flat_SD)

    @staticmethod
    def backward(
        ctx: Any, grad_rows_ND: Tensor, grad_rest_SD: Tensor
    ) -> tuple[Tensor, None]:
        (index_N,) = ctx.saved_tensors
        return _replaced(grad_rest_SD, grad_rows_ND, index_N), None


class _Put(torch.autograd.Function):
    """The tensor with other rows at an index."""

    @staticmethod
    def forward(ctx: Any, rest_SD: Tensor, new_ND: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        return _replaced(rest_SD, new_ND, index_N)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, Tensor, None]:
        (index_N,) = ctx.saved_tensors
        return grad_SD, rows_at(grad_SD, index_N), None


def rows_at(flat_SD: Tensor, index_N: Tensor) -> Tensor:
    """The rows at an index; zeros for unused slots."""
    last = flat_SD.shape[0] - 1
    rows_ND = flat_SD.index_select(0, index_N.clamp(max=last))
    return rows_ND.masked_fill((index_N > last).unsqueeze(1), 0)


def _replaced(flat_SD: Tensor, rows_ND: Tensor, index_N: Tensor) -> Tensor:
    """A copy with these rows at an index; unused slots write past its end."""
    size, width = flat_SD.shape
    padded = flat_SD.new_empty(size + 1, width)
    padded[:-1].copy_(flat_SD)
    padded.index_copy_(0, index_N, rows_ND)
    # Not a view to autograd, which refuses changes in place to a Function's views.
    return torch.ops.aten._unsafe_view(padded[:-1], [size, width])
