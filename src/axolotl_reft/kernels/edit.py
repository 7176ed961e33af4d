"""The edit h + Pᵀ(Mh + b) of rows, and its derivative, as Triton kernels.

On a GPU an operation costs its launch, whatever its size, and ``core/stacked_edits.py``
takes a dozen for an edit of two sides and as many for its derivative. Here they are one
forward and one backward, and one more for the parameters of all layers. That module is
the reference; ``kernels/launch.py`` launches these.

HAS_M is false where there is no M. A side is the intervention of the prefix or that of
the suffix; an index of S marks an unused slot. All sums are in float32.

Shapes: S tokens, D hidden size, L layers, N rows of both sides, those of side 0 first,
R rank, RP the next power of two.
"""

# Types are Triton's own.
# mypy: disable-error-code="import-untyped, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime import driver


def prepare() -> None:
    """Build what every launch needs, with the machine's C compiler; raises what Triton
    does where it cannot."""
    driver.active.get_current_target()


@triton.jit
def _of(side, first, second):
    """Return the argument of a program's side."""
    own = first
    if side == 1:
        own = second
    return own


@triton.jit
def _rows_of(index_0, index_1, rows_0, rows_1, tokens, ROWS: tl.constexpr):
    """A program's side, its rows' numbers among both sides', which of them there are,
    and the tokens they are of."""
    block = tl.program_id(0)
    side = (block >= tl.cdiv(rows_0, ROWS)).to(tl.int32)
    index, rows = _of(side, index_0, index_1), _of(side, rows_0, rows_1)
    block -= side * tl.cdiv(rows_0, ROWS)
    n = block * ROWS + tl.arange(0, ROWS)
    token = tl.load(index + n, mask=n < rows, other=tokens)
    return side, (side * rows_0 + n).to(tl.int64), n < rows, token


@triton.jit(do_not_specialize=["rows_0", "rows_1", "tokens"])
def edit_rows(
    h,
    out,
    taken,
    sources,
    index_0,
    index_1,
    m_0,
    m_1,
    bias_0,
    bias_1,
    p_0,
    p_1,
    rows_0,
    rows_1,
    tokens,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_M: tl.constexpr,
    KEEP: tl.constexpr,
):
    """``out`` (S, D) at the rows, and ``sources`` (N, R), which is Mh + b; where KEEP
    asks for it, ``taken`` (N, D), which the rows were, zero in unused slots."""
    side, n, there, token = _rows_of(index_0, index_1, rows_0, rows_1, tokens, ROWS)
    bias = _of(side, bias_0, bias_1)
    m_of_side, p_of_side = _of(side, m_0, m_1), _of(side, p_0, p_1)
    used = token < tokens
    r, d = tl.arange(0, RP), tl.arange(0, BLOCK)
    r3, d3 = r[None, :, None], d[None, None, :]
    sums = tl.zeros((ROWS, RP, BLOCK), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        if HAS_M:
            at_h = token[:, None, None] * D + start + d3
            in_h = used[:, None, None] & (start + d3 < D)
            row = tl.load(h + at_h, mask=in_h, other=0.0)
            in_m = (r3 < R) & (start + d3 < D)
            m = tl.load(m_of_side + r3 * D + start + d3, mask=in_m, other=0.0)
            sums += row.to(tl.float32) * m
    source = tl.sum(sums, axis=2) + tl.load(bias + r, mask=r < R, other=0.0)[None, :]
    all_sources = sources + n[:, None] * R + r[None, :]
    tl.store(all_sources, source, mask=there[:, None] & (r < R)[None, :])
    tl.debug_barrier()
    for start in range(0, D, BLOCK):
        columns = (start + d)[None, :]
        at = token[:, None] * D + columns
        inside = used[:, None] & (columns < D)
        row = tl.load(h + at, mask=inside, other=0.0)
        if KEEP:
            kept = taken + n[:, None] * D + columns
            tl.store(kept, row, mask=there[:, None] & (columns < D))
        new = row.to(tl.float32)
        for rank in tl.static_range(R):
            p = tl.load(p_of_side + rank * D + columns, mask=columns < D, other=0.0)
            new += tl.load(sources + n * R + rank, mask=there, other=0.0)[:, None] * p
        tl.store(out + at, new.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows_0", "rows_1", "tokens"])
def edit_rows_backward(
    grad,
    out,
    kept_grad,
    grad_sources,
    index_0,
    index_1,
    m_0,
    m_1,
    p_0,
    p_1,
    rows_0,
    rows_1,
    tokens,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_M: tl.constexpr,
    WRITE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """From ``grad`` (S, D): ``grad_sources`` (N, R), zero in unused slots; where WRITE
    asks for it, the gradient of h at the rows, ``out`` (S, D); and where KEEP does,
    ``kept_grad`` (N, D), which is ``grad`` at the rows, zero in unused slots."""
    side, n, there, token = _rows_of(index_0, index_1, rows_0, rows_1, tokens, ROWS)
    m_of_side, p_of_side = _of(side, m_0, m_1), _of(side, p_0, p_1)
    used = token < tokens
    r, d = tl.arange(0, RP), tl.arange(0, BLOCK)
    r3, d3 = r[None, :, None], d[None, None, :]
    sums = tl.zeros((ROWS, RP, BLOCK), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        at_g = token[:, None, None] * D + start + d3
        in_g = used[:, None, None] & (start + d3 < D)
        row = tl.load(grad + at_g, mask=in_g, other=0.0)
        in_p = (r3 < R) & (start + d3 < D)
        p = tl.load(p_of_side + r3 * D + start + d3, mask=in_p, other=0.0)
        sums += row.to(tl.float32) * p
    all_sources = grad_sources + n[:, None] * R + r[None, :]
    tl.store(all_sources, tl.sum(sums, axis=2), mask=there[:, None] & (r < R)[None, :])
    if WRITE or KEEP:
        tl.debug_barrier()
        for start in range(0, D, BLOCK):
            columns = (start + d)[None, :]
            at = token[:, None] * D + columns
            inside = used[:, None] & (columns < D)
            row = tl.load(grad + at, mask=inside, other=0.0)
            if KEEP:
                kept = kept_grad + n[:, None] * D + columns
                tl.store(kept, row, mask=there[:, None] & (columns < D))
            if WRITE:
                new = row.to(tl.float32)
                for rank in tl.static_range(R):
                    if HAS_M:
                        at_m = m_of_side + rank * D + columns
                        m = tl.load(at_m, mask=columns < D, other=0.0)
                        at_source = grad_sources + n * R + rank
                        source = tl.load(at_source, mask=there, other=0.0)
                        new += source[:, None] * m
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
    """Gradients of all layers' M and P (L, sides, R, D) and b (L, sides, R), from what
    the other two kernels kept of each layer, ``grad`` and ``taken`` (L, N, D), and from
    ``sources`` and ``grad_sources`` (L, N, R); a program for each block of columns,
    side and layer, and no RP below 16."""
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
    own = layer * tl.num_programs(1) + side
    at_out = (own * R + r)[:, None] * D + columns[None, :]
    inside = (r < R)[:, None] & (columns < D)[None, :]
    tl.store(grad_p + at_out, by_p, mask=inside)
    if HAS_M:
        tl.store(grad_m + at_out, by_m, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(grad_b + own * R + r, by_b, mask=r < R)
