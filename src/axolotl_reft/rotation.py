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
    """In float64, where the device has it (Apple's does not)."""
    return matrix if matrix.device.type == "mps" else matrix.double()


def _reflectors(vectors_DR: Tensor) -> tuple[Tensor, Tensor]:
    """Y (D, R) and T⁻¹ (R, R) with H₁H₂…H_R = I − Y T Yᵀ (compact WY form).

    H_i reflects along column i of Y, which is zero above the diagonal, one on it, and
    ``vectors_DR`` below it; what ``vectors_DR`` holds elsewhere is not used. T⁻¹ is
    triu(YᵀY, 1) + diag(YᵀY)/2 (Puglisi 1992; Joffrain et al. 2006).
    """
    y_DR = vectors_DR.tril(-1)
    _diagonal(y_DR).fill_(1)
    return y_DR, _half_triangle(y_DR.mT @ y_DR)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _half_triangle(square_RR: Tensor) -> Tensor:
    """The upper triangle with half of the diagonal; the map is its own derivative."""
    upper_RR = square_RR.triu()
    _diagonal(upper_RR).mul_(0.5)
    return upper_RR


def _solve(triangular_RR: Tensor, right: Tensor, upper: bool = True) -> Tensor:
    return torch.linalg.solve_triangular(triangular_RR, right, upper=upper)


def _leading_columns(y_DR: Tensor, t_inverse_RR: Tensor) -> tuple[Tensor, Tensor]:
    """The first R columns of −H₁H₂…H_R, which are Y C less the identity's, and C."""
    c_RR = _solve(t_inverse_RR, y_DR[..., : y_DR.shape[-1], :].mT)
    q_DR = y_DR @ c_RR
    _diagonal(q_DR).sub_(1)
    return q_DR, c_RR


class _Rotation(torch.autograd.Function):
    """R = B·Q(X) and its derivative in two dozen operations; autograd's own record of
    the same steps takes three times as many and keeps every product."""

    @staticmethod
    def forward(ctx: Any, vectors_DR: Tensor, base_DR: Tensor) -> Tensor:
        y_DR, t_inverse_RR = _reflectors(_wide(vectors_DR))
        r_DR, c_RR = _leading_columns(y_DR, t_inverse_RR)
        base_y_DR, base_t_inverse_RR = _reflectors(_wide(base_DR))
        r_DR[..., : r_DR.shape[-1], :] *= _diagonal(base_DR).unsqueeze(-1)
        r_DR -= base_y_DR @ _solve(base_t_inverse_RR, base_y_DR.mT @ r_DR)
        ctx.save_for_backward(
            y_DR, t_inverse_RR, c_RR, base_y_DR, base_t_inverse_RR, base_DR
        )
        return r_DR.to(vectors_DR.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_DR: Tensor) -> tuple[Tensor, None]:
        (y_DR, t_inverse_RR, c_RR, base_y_DR, base_t_inverse_RR, base_DR) = (
            ctx.saved_tensors
        )
        rank = grad_DR.shape[-1]
        wide_DR = _wide(grad_DR)
        # Through B: the same reflections in the other order.
        weights_RR = base_y_DR.mT @ wide_DR
        weights_RR = _solve(base_t_inverse_RR.mT, weights_RR, upper=False)
        grad_q_DR = wide_DR - base_y_DR @ weights_RR
        grad_q_DR[..., :rank, :] *= _diagonal(base_DR).unsqueeze(-1)
        # Through Q = Y C less the identity's columns, where T⁻¹ C = Y[:R]ᵀ.
        grad_y_DR = grad_q_DR @ c_RR.mT
        grad_top_RR = _solve(t_inverse_RR.mT, y_DR.mT @ grad_q_DR, upper=False)
        grad_y_DR[..., :rank, :] += grad_top_RR.mT
        # Through T⁻¹, half of the triangle of YᵀY.
        gram_RR = _half_triangle(grad_top_RR @ c_RR.mT)
        grad_y_DR -= y_DR @ (gram_RR + gram_RR.mT)
        return grad_y_DR.tril(-1).to(grad_DR.dtype), None


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
        (…, D, R), in the dtype of ``vectors_DR``.
    """
    return _Rotation.apply(vectors_DR, base_DR)


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
    q_DR, _ = _leading_columns(*_reflectors(vectors_DR))
    _diagonal(vectors_DR).copy_(-(q_DR * columns_DR).sum(0).sign())
    return vectors_DR.to(columns_DR.dtype)


def square_base(base_DR: Tensor) -> Tensor:
    """The D×D matrix B itself, which pyreft keeps; O(D²) memory."""
    rank = base_DR.shape[1]
    y_DR, t_inverse_RR = _reflectors(_wide(base_DR))
    b_DD = -y_DR @ _solve(t_inverse_RR, y_DR.mT)
    b_DD.diagonal().add_(1)
    b_DD[:, :rank] *= base_DR.diagonal()
    return b_DD.to(base_DR.dtype)


def random_base(size: int, rank: int) -> Tensor:
    """:func:`compact_base` of a uniformly random matrix, as pyreft starts (float32)."""
    columns_DR = torch.empty(size, rank, dtype=torch.float32)
    return compact_base(torch.nn.init.orthogonal_(columns_DR))
