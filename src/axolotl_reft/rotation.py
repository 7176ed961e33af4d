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

import torch
from torch import Tensor


def _wide(matrix: Tensor) -> Tensor:
    """In float64, where the device has it (Apple's does not)."""
    return matrix if matrix.device.type == "mps" else matrix.double()


def _diagonal(entries_R: Tensor, like_DR: Tensor) -> Tensor:
    """A (D, R) matrix with these entries on the diagonal, zero elsewhere."""
    return torch.zeros_like(like_DR).diagonal_scatter(entries_R.to(like_DR.dtype))


def _reflectors(vectors_DR: Tensor) -> tuple[Tensor, Tensor]:
    """Y (D, R) and T⁻¹ (R, R) with H₁H₂…H_R = I − Y T Yᵀ (compact WY form).

    H_i reflects along column i of Y, which is zero above the diagonal, one on it, and
    ``vectors_DR`` below it; what ``vectors_DR`` holds elsewhere is not used. T⁻¹ is
    triu(YᵀY, 1) + diag(YᵀY)/2 (Puglisi 1992; Joffrain et al. 2006).
    """
    ones_R = vectors_DR.new_ones(vectors_DR.shape[1])
    y_DR = vectors_DR.tril(-1) + _diagonal(ones_R, vectors_DR)
    gram_RR = y_DR.T @ y_DR
    return y_DR, gram_RR.triu(1) + _diagonal(gram_RR.diagonal() / 2, gram_RR)


def _leading_columns(vectors_DR: Tensor) -> Tensor:
    """The first R columns of −H₁H₂…H_R: the identity's for zero vectors."""
    rank = vectors_DR.shape[1]
    y_DR, t_inverse_RR = _reflectors(vectors_DR)
    weights_RR = torch.linalg.solve_triangular(t_inverse_RR, y_DR[:rank].T, upper=True)
    return y_DR @ weights_RR - _diagonal(y_DR.new_ones(rank), y_DR)


def rotation(vectors_DR: Tensor, base_DR: Tensor) -> Tensor:
    """The matrix R = B·Q(X), with orthonormal columns for any X.

    B is the orthogonal D×D matrix that ``base_DR`` stands for, Q(X) the first R columns
    of −H₁H₂…H_R for the vectors X; R(0) is the matrix ``base_DR`` was made from.

    Args:
        vectors_DR: X; its entries on and above the diagonal are not used.
        base_DR: what :func:`compact_base` returned.

    Returns:
        (D, R), in the dtype of ``vectors_DR``.
    """
    dtype, rank = vectors_DR.dtype, base_DR.shape[1]
    base_DR = _wide(base_DR)
    q_DR = _leading_columns(_wide(vectors_DR))
    q_DR = torch.cat([q_DR[:rank] * base_DR.diagonal().unsqueeze(1), q_DR[rank:]])
    y_DR, t_inverse_RR = _reflectors(base_DR)
    r_DR = q_DR - y_DR @ torch.linalg.solve_triangular(
        t_inverse_RR, y_DR.T @ q_DR, upper=True
    )
    return r_DR.to(dtype)


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
    signs_R = -(_leading_columns(vectors_DR) * columns_DR).sum(0).sign()
    return (vectors_DR + _diagonal(signs_R, vectors_DR)).to(columns_DR.dtype)


def square_base(base_DR: Tensor) -> Tensor:
    """The D×D matrix B itself, which pyreft keeps; O(D²) memory."""
    rank = base_DR.shape[1]
    y_DR, t_inverse_RR = _reflectors(_wide(base_DR))
    b_DD = -y_DR @ torch.linalg.solve_triangular(t_inverse_RR, y_DR.T, upper=True)
    b_DD.diagonal().add_(1)
    b_DD[:, :rank] *= base_DR.diagonal()
    return b_DD.to(base_DR.dtype)


def random_base(size: int, rank: int) -> Tensor:
    """:func:`compact_base` of a uniformly random matrix, as pyreft starts (float32)."""
    columns_DR = torch.empty(size, rank, dtype=torch.float32)
    return compact_base(torch.nn.init.orthogonal_(columns_DR))
