"""The rotations of rotation.py and their derivative as two Triton kernels.

On a GPU the two dozen operations of rotation.py cost their launches, whatever their
size, and the first layer's edit waits for them. Here the rotations of all layers are
one launch, and so is their derivative. rotation.py is the reference, and says what is
computed and why; rotation_launches.py calls these.

Numbers are read where they lie, by their addresses: to stack a hundred tensors takes
the host longer than the rest of this. All sums are in float64.

Shapes: K matrices, one a program, D hidden size, R rank, N = 2R reflections, those of
the base first; RP and NP the next powers of two, no less than 16.
"""

# Types are Triton's own.
# mypy: disable-error-code="import-untyped, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _addressed(addresses, number):
    return tl.load(addresses + number).to(tl.pointer_type(tl.float32))


@triton.jit
def _signs(base, d, R: tl.constexpr):
    """S, on the diagonal of the base, and ones right of it."""
    return tl.load(base + d * R + d, mask=d < R, other=1.0).to(tl.float64)


@triton.jit
def _y_tile(base, vectors, d, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr):
    """Columns d of Y (N, D), zero past its rows and columns."""
    n, columns = tl.arange(0, NP)[:, None], d[None, :]
    of_base = n < R
    r = tl.where(of_base, n, n - R)
    inside = (columns > r) & (columns < D)
    own = tl.load(base + columns * R + r, mask=of_base & inside, other=0.0)
    free = (n >= R) & (n < 2 * R)
    own += tl.load(vectors + columns * R + r, mask=free & inside, other=0.0)
    y = tl.where((columns == r) & (n < 2 * R), 1.0, own).to(tl.float64)
    return tl.where(of_base, y * _signs(base, d, R)[None, :], y)


@triton.jit
def _row(tile, n, one):
    """A row of a tile whose rows are numbered n."""
    return tl.sum(tl.where((n == one)[:, None], tile, 0.0), axis=0)


@triton.jit
def rotate(
    addresses,
    out,
    t_inverse,
    c,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    NP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out`` (K, R, D), and for backward ``t_inverse`` (K, NP, NP) and ``c`` (K, NP,
    RP), float64; ``addresses`` (2, K) are those of the bases and vectors (D, R)."""
    k = tl.program_id(0)
    base = _addressed(addresses, k)
    vectors = _addressed(addresses, tl.num_programs(0) + k)
    n, r, d = tl.arange(0, NP), tl.arange(0, RP), tl.arange(0, BLOCK)
    t = t_inverse + k * NP * NP
    gram = tl.zeros((NP, NP), dtype=tl.float64)
    for start in range(0, D, BLOCK):
        y = _y_tile(base, vectors, start + d, D, R, NP)
        gram = tl.dot(y, tl.trans(y), gram, out_dtype=tl.float64)
    half = tl.where(n[:, None] == n[None, :], 0.5 * gram, gram)
    tl.store(t + n[:, None] * NP + n[None, :], half)
    tl.debug_barrier()
    solved = tl.where((r < R)[None, :], _y_tile(base, vectors, r, D, R, NP), 0.0)
    for step in range(0, 2 * R):
        one = 2 * R - 1 - step
        row = _row(solved, n, one) / tl.load(t + one * NP + one)
        above = tl.load(t + n * NP + one, mask=n < one, other=0.0)
        solved -= above[:, None] * row[None, :]
        solved = tl.where((n == one)[:, None], row[None, :], solved)
    tl.store(c + (k * NP + n[:, None]) * RP + r[None, :], solved)
    for start in range(0, D, BLOCK):
        columns = start + d
        y = _y_tile(base, vectors, columns, D, R, NP)
        q = tl.dot(tl.trans(solved), y, out_dtype=tl.float64)
        q = tl.where(r[:, None] == columns[None, :], q - 1.0, q)
        q *= _signs(base, columns, R)[None, :]
        inside = (r < R)[:, None] & (columns < D)[None, :]
        tl.store(
            out + (k * R + r[:, None]) * D + columns[None, :],
            q.to(tl.float32),
            mask=inside,
        )


@triton.jit
def rotate_backward(
    addresses,
    grad,
    t_inverse,
    c,
    gram,
    grad_top,
    out,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    NP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From ``grad`` (K, R, D) the gradients of the vectors, ``out`` (K, D, R), zero
    where those are not used; ``gram`` (K, NP, NP) and ``grad_top`` (K, NP, RP) are
    places for numbers on the way, float64."""
    k = tl.program_id(0)
    base = _addressed(addresses, k)
    vectors = _addressed(addresses, tl.num_programs(0) + k)
    n, r, d = tl.arange(0, NP), tl.arange(0, RP), tl.arange(0, BLOCK)
    t, own_gram = t_inverse + k * NP * NP, gram + k * NP * NP
    own_c, own_top = c + k * NP * RP, grad_top + k * NP * RP
    solved = tl.zeros((NP, RP), dtype=tl.float64)
    for start in range(0, D, BLOCK):
        y = _y_tile(base, vectors, start + d, D, R, NP)
        grad_q = _grad_q_tile(grad + k * R * D, base, start + d, D, R, RP)
        solved = tl.dot(y, tl.trans(grad_q), solved, out_dtype=tl.float64)
    for one in range(0, 2 * R):
        row = _row(solved, n, one) / tl.load(t + one * NP + one)
        right_of = tl.load(t + one * NP + n, mask=n > one, other=0.0)
        solved -= right_of[:, None] * row[None, :]
        solved = tl.where((n == one)[:, None], row[None, :], solved)
    tl.store(own_top + n[:, None] * RP + r[None, :], solved)
    all_c = tl.load(own_c + n[:, None] * RP + r[None, :])
    products = tl.dot(solved, tl.trans(all_c), out_dtype=tl.float64)
    tl.store(own_gram + n[:, None] * NP + n[None, :], products)
    tl.debug_barrier()
    # The rows of X alone.
    own = R + r[:, None]
    there = (r < R)[:, None]
    c_x = tl.load(own_c + own * RP + r[None, :], mask=there, other=0.0)
    # The upper triangle, and its mirror image.
    upper = tl.minimum(own, n[None, :]) * NP + tl.maximum(own, n[None, :])
    through = tl.load(own_gram + upper, mask=there, other=0.0)
    for start in range(0, D, BLOCK):
        columns = start + d
        y = _y_tile(base, vectors, columns, D, R, NP)
        grad_q = _grad_q_tile(grad + k * R * D, base, columns, D, R, RP)
        grad_y = tl.dot(c_x, grad_q, out_dtype=tl.float64)
        grad_y -= tl.dot(through, y, out_dtype=tl.float64)
        first = there & (columns < R)[None, :]
        top = own_top + own * RP + columns[None, :]
        grad_y += tl.load(top, mask=first, other=0.0)
        below = columns[None, :] > r[:, None]
        at = out + (k * D + columns[None, :]) * R + r[:, None]
        inside = there & (columns < D)[None, :]
        tl.store(at, tl.where(below, grad_y, 0.0).to(tl.float32), mask=inside)


@triton.jit
def _grad_q_tile(grad, base, d, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """Columns d of the gradient of Q's rows (R, D)."""
    r, columns = tl.arange(0, RP)[:, None], d[None, :]
    inside = (r < R) & (columns < D)
    own = tl.load(grad + r * D + columns, mask=inside, other=0.0)
    return own.to(tl.float64) * _signs(base, d, R)[None, :]
