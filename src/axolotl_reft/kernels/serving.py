"""The edit of a served step's rows, in place, as one Triton kernel.

``serving/edited_rows.py`` has torch's operations that it takes the place of, and the
buffers that it reads. A captured graph replays the launch and none of Python, so which
rows are edited, and by what, is read on the GPU, and the grid is that of the step's
tokens: most programs find nothing to do. All sums are in float32.

Shapes: T tokens of a step, N edited rows, E edits, D hidden size, R rank, RP the next
power of two.
"""

# Types are Triton's own.
# mypy: disable-error-code="import-untyped, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from axolotl_reft.kernels.launch import PRODUCTS


def launch_edit(
    hidden_TD: Tensor,
    residual_TD: Tensor | None,
    m_ERD: Tensor,
    b_ER: Tensor,
    p_ERD: Tensor,
    rows_T: Tensor,
    edits_T: Tensor,
    starts_E1: Tensor,
    strengths_T1: Tensor,
) -> None:
    """Edit the first N = ``starts_E1[E]`` of ``rows_T`` as ``edited_rows.edit_rows``
    does; N is read on the device, and T may be less than the capacity of the rows."""
    (tokens, width), (edits, rank) = hidden_TD.shape, b_ER.shape
    padded = triton.next_power_of_2(rank)
    # In the place of None, a tensor that the kernel does not read.
    residual = hidden_TD if residual_TD is None else residual_TD
    with torch.cuda.device_of(hidden_TD):  # else Triton takes the current one
        edit_step[(tokens,)](
            hidden_TD, residual, m_ERD, b_ER, p_ERD, rows_T, edits_T, starts_E1,
            strengths_T1, *hidden_TD.stride(), *residual.stride(), E=edits, D=width,
            R=rank, RP=padded,
            BLOCK=min(PRODUCTS // padded, triton.next_power_of_2(width)),
            HAS_RESIDUAL=residual_TD is not None, num_warps=8,
        )  # fmt: skip


@triton.jit
def edit_step(
    hidden,
    residual,
    m,
    b,
    p,
    rows,
    edits,
    starts,
    strengths,
    hidden_row,
    hidden_column,
    residual_row,
    residual_column,
    E: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """In row ``rows[n]`` of ``residual`` (T, D), n being the program, x + αPᵀ(Mx + b)
    with M and P (E, R, D) and b (E, R) of ``edits[n]`` and α of ``strengths[n]``, where
    x is ``hidden`` + ``residual`` in their dtype, and zero in that of ``hidden``;
    without a residual, x is ``hidden`` and is replaced. The strides are those of rows
    and columns."""
    n = tl.program_id(0)
    if n < tl.load(starts + E):
        row, edit = tl.load(rows + n), tl.load(edits + n)
        hidden += row * hidden_row
        residual += row * residual_row
        m += edit * R * D
        p += edit * R * D
        r = tl.arange(0, RP)
        sums = tl.zeros((RP, BLOCK), dtype=tl.float32)
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            at_hidden = hidden + d * hidden_column
            at_residual = residual + d * residual_column
            x = layer_output(at_hidden, at_residual, d < D, HAS_RESIDUAL)
            at_m = m + r[:, None] * D + d[None, :]
            in_m = (r < R)[:, None] & (d < D)[None, :]
            sums += x[None, :] * tl.load(at_m, mask=in_m, other=0.0)
        source = tl.sum(sums, axis=1)
        source += tl.load(b + edit * R + r, mask=r < R, other=0.0)
        source *= tl.load(strengths + n)
        # No thread may write a column that another has still to read.
        tl.debug_barrier()
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            at_hidden = hidden + d * hidden_column
            at_residual = residual + d * residual_column
            x = layer_output(at_hidden, at_residual, d < D, HAS_RESIDUAL)
            at_p = p + r[:, None] * D + d[None, :]
            in_p = (r < R)[:, None] & (d < D)[None, :]
            products = source[:, None] * tl.load(at_p, mask=in_p, other=0.0)
            new = (x + tl.sum(products, axis=0)).to(hidden.dtype.element_ty)
            if HAS_RESIDUAL:
                tl.store(at_residual, new, mask=d < D)
                new = tl.zeros_like(new)
            tl.store(at_hidden, new, mask=d < D)


@triton.jit
def layer_output(at_hidden, at_residual, inside, HAS_RESIDUAL: tl.constexpr):
    """Columns of a layer's output, rounded to the layer's dtype, in float32."""
    x = tl.load(at_hidden, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(at_residual, mask=inside, other=0.0).to(tl.float32)
        x = x.to(at_hidden.dtype.element_ty).to(tl.float32)
    return x
