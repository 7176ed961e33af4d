"""The edit h + Pᵀ(Mh + b) of rows, and its derivative, as Triton kernels.

On a GPU an operation costs its launch, whatever its size, and ``core/stacked_edits.py``
takes a dozen for an edit of two sides and as many for its derivative. Here each is one,
of the same kernel, and the parameters' gradients of all layers are one more. That
module is the reference; ``kernels/launch.py`` launches these.

A side is the intervention of the prefix or that of the suffix; an index of S marks an
unused slot. All sums are in float32.

Shapes: S tokens, D hidden size, L layers, N rows of both sides, those of side 0 first,
R rank, RP the next power of two.
"""

# Types are Triton's own.
# mypy: disable-error-code="import-untyped, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _of(side, first, second):
    """Return the argument of a program's side."""
    if side == 1:
        first = second
    return first


@triton.jit(do_not_specialize=["rows_0", "rows_1", "tokens"])
def edit_rows(
    x,
    out,
    taken,
    sources,
    index_0,
    index_1,
    first_0,
    first_1,
    bias_0,
    bias_1,
    second_0,
    second_1,
    rows_0,
    rows_1,
    tokens,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    KEEP: tl.constexpr,
):
    """``sources`` (N, R), which is first·x + bias at the rows of x (S, D), themselves
    zero in unused slots; where HAS_SECOND, ``out`` (S, D) at the rows, x +
    secondᵀ·source; where KEEP, ``taken`` (N, D), the rows of x."""
    block, blocks_0 = tl.program_id(0), tl.cdiv(rows_0, ROWS)
    side = (block >= blocks_0).to(tl.int32)
    first, second = _of(side, first_0, first_1), _of(side, second_0, second_1)
    n = (block - side * blocks_0) * ROWS + tl.arange(0, ROWS)
    there = n < _of(side, rows_0, rows_1)
    token = tl.load(_of(side, index_0, index_1) + n, mask=there, other=tokens)
    used = token < tokens
    n = (side * rows_0 + n).to(tl.int64)
    r, d = tl.arange(0, RP), tl.arange(0, BLOCK)
    r3, d3 = r[None, :, None], d[None, None, :]
    sums = tl.zeros((ROWS, RP, BLOCK), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        if HAS_FIRST:
            at_x = token[:, None, None] * D + start + d3
            in_x = used[:, None, None] & (start + d3 < D)
            row = tl.load(x + at_x, mask=in_x, other=0.0)
            in_first = (r3 < R) & (start + d3 < D)
            m = tl.load(first + r3 * D + start + d3, mask=in_first, other=0.0)
            sums += row.to(tl.float32) * m
    source = tl.sum(sums, axis=2)
    if HAS_BIAS:
        bias = _of(side, bias_0, bias_1)
        source += tl.load(bias + r, mask=r < R, other=0.0)[None, :]
    all_sources = sources + n[:, None] * R + r[None, :]
    tl.store(all_sources, source, mask=there[:, None] & (r < R)[None, :])
    if HAS_SECOND or KEEP:
        tl.debug_barrier()
        for start in range(0, D, BLOCK):
            columns = (start + d)[None, :]
            at = token[:, None] * D + columns
            inside = used[:, None] & (columns < D)
            row = tl.load(x + at, mask=inside, other=0.0)
            if KEEP:
                kept = taken + n[:, None] * D + columns
                tl.store(kept, row, mask=there[:, None] & (columns < D))
            if HAS_SECOND:
                new = row.to(tl.float32)
                for rank in tl.static_range(R):
                    at_p = second + rank * D + columns
                    p = tl.load(at_p, mask=columns < D, other=0.0)
                    at_source = sources + n * R + rank
                    product = tl.load(at_source, mask=there, other=0.0)
                    new += product[:, None] * p
                tl.store(out + at, new.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows_0", "rows_1"])
def edit_weights_backward(
    grad,
    taken,
    sources,
    grad_sources,
    grad_m,
    grad_b,
    grad_p,
    rows_0,
    rows_1,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_M: tl.constexpr,
):
    """Gradients of all layers' M and P (L, sides, R, D) and b (L, sides, R), from the
    rows that ``edit_rows`` kept of each layer, ``grad`` and ``taken`` (L, N, D), and
    from ``sources`` and ``grad_sources`` (L, N, R); a program for each block of
    columns, side and layer, and no RP below 16."""
    side, layer = tl.program_id(1), tl.program_id(2)
    rows = _of(side, rows_0, rows_1)
    first = layer.to(tl.int64) * (rows_0 + rows_1) + side * rows_0
    r = tl.arange(0, RP)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    by_m = tl.zeros((RP, BLOCK), dtype=tl.float32)
    by_p = tl.zeros((RP, BLOCK), dtype=tl.float32)
    by_b = tl.zeros((RP,), dtype=tl.float32)
    for start in range(0, rows, ROWS):
        n = start + tl.arange(0, ROWS)
        narrow = (r < R)[:, None] & (n < rows)[None, :]
        at = (first + n)[None, :] * R + r[:, None]
        wide = (n < rows)[:, None] & (columns < D)[None, :]
        at_row = (first + n)[:, None] * D + columns[None, :]
        row = tl.load(grad + at_row, mask=wide, other=0.0).to(tl.float32)
        source = tl.load(sources + at, mask=narrow, other=0.0)
        by_p = tl.dot(source, row, by_p, input_precision="ieee")
        grad_source = tl.load(grad_sources + at, mask=narrow, other=0.0)
        by_b += tl.sum(grad_source, axis=1)
        if HAS_M:
            was = tl.load(taken + at_row, mask=wide, other=0.0).to(tl.float32)
            by_m = tl.dot(grad_source, was, by_m, input_precision="ieee")
    place = layer * tl.num_programs(1) + side
    at_out = (place * R + r)[:, None] * D + columns[None, :]
    inside = (r < R)[:, None] & (columns < D)[None, :]
    tl.store(grad_p + at_out, by_p, mask=inside)
    if HAS_M:
        tl.store(grad_m + at_out, by_m, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(grad_b + place * R + r, by_b, mask=r < R)
