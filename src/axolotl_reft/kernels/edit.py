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


@triton.jit(do_not_specialize=["rows_0", "rows_1", "tokens"])
def edit_rows(
    x,
    out,
    sources,
    index,
    taken,
    m,
    b,
    p,
    rows_0,
    rows_1,
    tokens,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_M: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_P: tl.constexpr,
    KEEP: tl.constexpr,
):
    """At the rows of ``x`` (S, D) that ``index`` (N,) names, with M and P (sides, R, D)
    and b (sides, R): ``sources`` (N, R), Mx + b; where HAS_P, ``out`` (S, D), x + Pᵀ(Mx
    + b); where KEEP, ``taken`` (N, D), x. In unused slots, x is zero."""
    block, blocks_0 = tl.program_id(0), tl.cdiv(rows_0, ROWS)
    side = (block >= blocks_0).to(tl.int32)
    n = (block - side * blocks_0) * ROWS + tl.arange(0, ROWS)
    there = n < tl.where(side == 0, rows_0, rows_1)
    n = (side * rows_0 + n).to(tl.int64)
    token = tl.load(index + n, mask=there, other=tokens)
    used = token < tokens
    r, d = tl.arange(0, RP), tl.arange(0, BLOCK)
    r3, d3 = r[None, :, None], d[None, None, :]
    sums = tl.zeros((ROWS, RP, BLOCK), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        if HAS_M:
            at_x = token[:, None, None] * D + start + d3
            in_x = used[:, None, None] & (start + d3 < D)
            row = tl.load(x + at_x, mask=in_x, other=0.0)
            at_m = (side * R + r3) * D + start + d3
            in_m = (r3 < R) & (start + d3 < D)
            sums += row.to(tl.float32) * tl.load(m + at_m, mask=in_m, other=0.0)
    source = tl.sum(sums, axis=2)
    if HAS_B:
        source += tl.load(b + side * R + r, mask=r < R, other=0.0)[None, :]
    all_sources = sources + n[:, None] * R + r[None, :]
    tl.store(all_sources, source, mask=there[:, None] & (r < R)[None, :])
    if HAS_P or KEEP:
        tl.debug_barrier()
        for start in range(0, D, BLOCK):
            columns = (start + d)[None, :]
            at_x = token[:, None] * D + columns
            in_x = used[:, None] & (columns < D)
            row = tl.load(x + at_x, mask=in_x, other=0.0)
            if KEEP:
                kept = taken + n[:, None] * D + columns
                tl.store(kept, row, mask=there[:, None] & (columns < D))
            if HAS_P:
                new = row.to(tl.float32)
                for rank in tl.static_range(R):
                    at_p = p + (side * R + rank) * D + columns
                    of_p = tl.load(at_p, mask=columns < D, other=0.0)
                    of_source = tl.load(sources + n * R + rank, mask=there, other=0.0)
                    new += of_source[:, None] * of_p
                tl.store(out + at_x, new.to(out.dtype.element_ty), mask=in_x)


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
    rows = tl.where(side == 0, rows_0, rows_1)
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
