"""Orthonormal d×r matrices held in O(dr) numbers: Householder vectors on a base.

Replaces ``torch.nn.utils.parametrizations.orthogonal``, which keeps a full d×d base,
differentiates through ``householder_product`` (a thousand times slower on a CPU), and
loses R altogether under weight decay. The map is the same one: with the same base and
the same vectors, R and its gradient agree with torch's to rounding. Torch only.

The products run in float64: float32 sums over a hidden size of 4096 left R up to 7e-6
from orthonormal, float64 ones rounded at the end 2e-9 (4096×8, on a CPU); nor do TF32
and autocast reach them.

Shapes: D rows (hidden size), R columns (rank).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _wide(matrix: Tensor) -> Tensor:
    """In float64, where the device has it (Apple's does not), laid out row by row."""
    dtype = matrix.dtype if matrix.device.type == "mps" else torch.float64
    return matrix.to(dtype, memory_format=torch.contiguous_format)


def _reflectors(vectors_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Y (R, D) and T⁻¹ (R, R) with H₁H₂…H_R = I − Yᵀ T Y (compact WY form).

    H_i reflects along row i of Y, which is zero left of the diagonal, one on it, and
    ``vectors_RD`` right of it; what ``vectors_RD`` holds elsewhere is not used. T⁻¹ is
    triu(YYᵀ, 1) + diag(YYᵀ)/2 (Puglisi 1992; Joffrain et al. 2006).
    """
    y_RD = vectors_RD.triu(1)
    _diagonal(y_RD).fill_(1)
    return y_RD, _half_triangle(y_RD @ y_RD.mT)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _half_triangle(square_RR: Tensor) -> Tensor:
    """The upper triangle with half of the diagonal; the map is its own derivative."""
    upper_RR = square_RR.triu()
    _diagonal(upper_RR).mul_(0.5)
    return upper_RR


def _solve(triangular_RR: Tensor, right: Tensor, upper: bool = True) -> Tensor:
    return torch.linalg.solve_triangular(triangular_RR, right, upper=upper)


def _leading_columns(y_RD: Tensor, t_inverse_RR: Tensor) -> tuple[Tensor, Tensor]:
    """The first R columns of −H₁H₂…H_R as rows, which are CᵀY less the identity's,
    and C."""
    c_RR = _solve(t_inverse_RR, y_RD[..., : y_RD.shape[-2]])
    q_RD = c_RR.mT @ y_RD
    _diagonal(q_RD).sub_(1)
    return q_RD, c_RR


class _Rotation(torch.autograd.Function):
    """R = B·Q(X) and its derivative in two dozen operations; autograd's own record of
    the same steps takes three times as many and keeps every product.

    R comes out as rows (R, D): their products with hidden states are up to five times
    faster on a CPU than those of columns (hᵀs of 56×4096 and 56×8, float32: 50 µs as
    sᵀh, 240 as it stands). The gradient is laid out as the vectors are: autograd would
    copy any other.
    """

    @staticmethod
    def forward(ctx: Any, vectors_DR: Tensor, base_DR: Tensor) -> Tensor:
        base_RD = base_DR.mT
        y_RD, t_inverse_RR = _reflectors(_wide(vectors_DR.mT))
        r_RD, c_RR = _leading_columns(y_RD, t_inverse_RR)
        base_y_RD, base_t_inverse_RR = _reflectors(_wide(base_RD))
        r_RD[..., : r_RD.shape[-2]] *= _diagonal(base_RD).unsqueeze(-2)
        r_RD -= _solve(base_t_inverse_RR, base_y_RD @ r_RD.mT).mT @ base_y_RD
        ctx.save_for_backward(
            y_RD, t_inverse_RR, c_RR, base_y_RD, base_t_inverse_RR, base_DR
        )
        return r_RD.to(vectors_DR.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        (y_RD, t_inverse_RR, c_RR, base_y_RD, base_t_inverse_RR, base_DR) = (
            ctx.saved_tensors
        )
        rank = grad_RD.shape[-2]
        wide_RD = _wide(grad_RD)
        # Through B: the same reflections in the other order.
        weights_RR = base_y_RD @ wide_RD.mT
        weights_RR = _solve(base_t_inverse_RR.mT, weights_RR, upper=False)
        grad_q_RD = wide_RD - weights_RR.mT @ base_y_RD
        grad_q_RD[..., :rank] *= _diagonal(base_DR).unsqueeze(-2)
        # Through Q = CᵀY less the identity's rows, where T⁻¹ C = Y[:, :R].
        grad_top_RR = _solve(t_inverse_RR.mT, y_RD @ grad_q_RD.mT, upper=False)
        # Through T⁻¹, half of the triangle of YYᵀ.
        gram_RR = _half_triangle(grad_top_RR @ c_RR.mT)
        grad_y_RD = c_RR @ grad_q_RD - (gram_RR + gram_RR.mT) @ y_RD
        grad_y_RD[..., :rank] += grad_top_RR
        grad_DR = grad_y_RD.triu(1).mT
        return grad_DR.to(grad_RD.dtype, memory_format=torch.contiguous_format), None


def rotation(vectors_DR: Tensor, base_DR: Tensor) -> Tensor:
    """The matrix R = B·Q(X), with orthonormal columns for any X.

    B is the orthogonal D×D matrix that ``base_DR`` stands for, Q(X) the first R columns
    of −H₁H₂…H_R for the vectors X; R(0) is the matrix ``base_DR`` was made from.
    Differentiable once, in X.

    Args:
        vectors_DR: X; its entries on and above the diagonal are not used. Several at
            once, (…, D, R), are one computation.
        base_DR: what :func:`compact_base` returned, of the same shape.

    Returns:
        (…, D, R), in the dtype of ``vectors_DR``; in memory, column after column.
    """
    return _Rotation.apply(vectors_DR, base_DR).mT


def compact_base(columns_DR: Tensor) -> Tensor:
    """The numbers that stand for an orthogonal D×D matrix beginning with these columns.

    Below the diagonal, the Householder vectors of ``torch.geqrf``; on it, the signs
    ±1 that LAPACK leaves in its triangular factor. Nothing is lost for any orthonormal
    ``columns_DR``, so a trained R can become a base as well as a random one.

    Args:
        columns_DR: orthonormal columns, D ≥ R.

    Raises:
        ValueError: more columns than rows.
    """
    if columns_DR.shape[0] < columns_DR.shape[1]:
        raise ValueError(
            f"rank {columns_DR.shape[1]} is larger than the hidden size "
            f"{columns_DR.shape[0]}; choose a rank of at most {columns_DR.shape[0]}"
        )
    vectors_DR = torch.geqrf(_wide(columns_DR)).a.tril(-1)
    # H₁…H_R begins with the columns themselves, up to one sign each.
    q_RD, _ = _leading_columns(*_reflectors(vectors_DR.mT))
    _diagonal(vectors_DR).copy_(-(q_RD.mT * columns_DR).sum(0).sign())
    return vectors_DR.to(columns_DR.dtype)


def square_base(base_DR: Tensor) -> Tensor:
    """The D×D matrix B itself, which pyreft keeps; O(D²) memory."""
    rank = base_DR.shape[1]
    y_RD, t_inverse_RR = _reflectors(_wide(base_DR.mT))
    b_DD = -y_RD.mT @ _solve(t_inverse_RR, y_RD)
    b_DD.diagonal().add_(1)
    b_DD[:, :rank] *= base_DR.diagonal()
    return b_DD.to(base_DR.dtype)


def random_base(size: int, rank: int) -> Tensor:
    """:func:`compact_base` of a uniformly random matrix, as pyreft starts (float32)."""
    columns_DR = torch.empty(size, rank, dtype=torch.float32)
    return compact_base(torch.nn.init.orthogonal_(columns_DR))
