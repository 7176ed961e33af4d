"""Orthonormal d×r matrices in O(dr) memory: Householder vectors on a base.

Replaces ``torch.nn.utils.parametrizations.orthogonal``, which keeps a full d×d base,
differentiates through ``householder_product`` (a thousand times slower on a CPU), and
loses R under weight decay. The map is the same: of the same base and vectors, R and its
gradient agree with torch's to rounding. Torch only.

The products run in float64: float32 sums over a hidden size of 4096 left R up to 7e-6
from orthonormal, float64 ones rounded at the end 3e-9 (4096×8, on a CPU); nor do TF32
and autocast reach them.

Shapes: D hidden size, R rank (the paper's matrix R is R×D), K matrices at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import solve_triangular

# How far from orthonormal a saved R may be: bfloat16 rounding passes, pyreft's drift
# after a resume (0.05 and more, stanfordnlp/pyreft#179) does not.
ORTHONORMALITY_TOLERANCE = 0.02


def _as_float64(matrix: Tensor) -> Tensor:
    """Copy row by row in float64, where the device has it (Apple's does not)."""
    dtype = matrix.dtype if matrix.device.type == "mps" else torch.float64
    return matrix.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _reflectors(vectors_RD: Tensor) -> Tensor:
    """Return Y (R, D) of the reflections H₁H₂…H_R = I − Yᵀ T Y (compact WY form): H_i
    reflects along its row i, zero left of the diagonal, one on it, the vector right."""
    y_RD = _as_float64(vectors_RD).triu_(1)
    _diagonal(y_RD).fill_(1)
    return y_RD


def _half_triangle(square_RR: Tensor) -> Tensor:
    """Return the upper triangle with half of the diagonal, which of YYᵀ is T⁻¹ (Puglisi
    1992; Joffrain et al. 2006); the map is its own derivative."""
    upper_RR = square_RR.triu()
    _diagonal(upper_RR).mul_(0.5)
    return upper_RR


def _rotate(
    bases: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return R (K, R, D), and what its derivative needs.

    The reflections of B and of X are one sequence of N = 2R: the signs S in B = H·S
    are moved to its left, S·(SHS)·Q, and SHS reflects along B's vectors times S.
    """
    count, rank = len(vectors), vectors[0].shape[1]
    both_DR = torch.stack([*bases, *vectors])
    signs_K1R = _diagonal(both_DR[:count]).unsqueeze(1)
    y_K2RD = _reflectors(both_DR.unflatten(0, (2, count)).permute(1, 0, 3, 2))
    y_K2RD[:, 0, :, :rank].mul_(signs_K1R)
    y_KND = y_K2RD.flatten(1, 2)
    t_inverse_KNN = _half_triangle(y_KND @ y_KND.mT)
    # The first columns of −H₁H₂…H_N, as rows: CᵀY less the identity's.
    c_KNR = solve_triangular(t_inverse_KNN, y_KND[..., :rank], upper=True)
    r_KRD = c_KNR.mT @ y_KND
    _diagonal(r_KRD).sub_(1)
    r_KRD[..., :rank].mul_(signs_K1R)
    return r_KRD.to(both_DR.dtype), (y_KND, t_inverse_KNN, c_KNR)


class _Rotations(torch.autograd.Function):
    """R = B·Q(X) for several X, and its derivative, in two dozen operations: a third of
    autograd's for the same steps, which also keep every product."""

    @staticmethod
    def forward(ctx: Any, bases: Sequence[Tensor], *vectors: Tensor) -> Tensor:
        r_KRD, saved = _rotate(bases, vectors)
        ctx.save_for_backward(*saved)
        return r_KRD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KRD: Tensor) -> tuple[Tensor | None, ...]:
        y_KND, t_inverse_KNN, c_KNR = ctx.saved_tensors
        rank = grad_KRD.shape[1]
        # S is still on the diagonal of B's vectors.
        signs_K1R = _diagonal(y_KND[:, :rank]).unsqueeze(1)
        grad_q_KRD = _as_float64(grad_KRD)
        grad_q_KRD[..., :rank].mul_(signs_K1R)
        # Through Q = CᵀY less the identity's rows, where T⁻¹ C = Y[:, :R].
        right_KNR = y_KND @ grad_q_KRD.mT
        grad_top_KNR = solve_triangular(t_inverse_KNN.mT, right_KNR, upper=False)
        # Through T⁻¹, half of the triangle of YYᵀ; of Y, X has the lower half.
        gram_KNN = _half_triangle(grad_top_KNR @ c_KNR.mT)
        through_gram_KRN = (gram_KNN + gram_KNN.mT)[:, rank:]
        grad_y_KRD = torch.baddbmm(
            c_KNR[:, rank:] @ grad_q_KRD, through_gram_KRN, y_KND, alpha=-1
        )
        grad_y_KRD[..., :rank].add_(grad_top_KNR[:, rank:])
        # Laid out as the vectors are: autograd would copy any other gradient.
        grad_KDR = grad_y_KRD.triu_(1).mT
        grad_KDR = grad_KDR.to(grad_KRD.dtype, memory_format=torch.contiguous_format)
        return None, *grad_KDR.unbind(0)


def rotations(vectors: Sequence[Tensor], bases: Sequence[Tensor]) -> Tensor:
    """Return :func:`rotation` of K vectors and bases of one shape, as rows (K, R, D).

    As rows, since their products with hidden states are up to five times faster on a
    CPU than those of columns (56×4096 and 56×8, float32: 50 µs as sᵀh, 240 as hᵀs).
    """
    if not torch.is_grad_enabled():
        # A compiled Function of two vectors would lose its ctx here:
        # findings/compiled-function-without-gradients.sh
        return _rotate(bases, vectors)[0]
    return _Rotations.apply(bases, *vectors)


def rotation(vectors_DR: Tensor, base_DR: Tensor) -> Tensor:
    """Return Rᵀ = B·Q(X) (D, R), with orthonormal columns for any X.

    B is the orthogonal D×D matrix that ``base_DR`` stands for (:func:`compact_base`),
    Q(X) the first R columns of −H₁H₂…H_R for the vectors X, whose entries on and above
    the diagonal are not used. For X = 0 it is the matrix that the base was made from.
    Differentiable once, in X. In memory, it lies column after column.
    """
    return rotations([vectors_DR], [base_DR])[0].mT


def compact_base(columns_DR: Tensor) -> Tensor:
    """Return the compact form of an orthogonal D×D matrix with these first columns.

    Below the diagonal, the Householder vectors of ``torch.geqrf``; on it, the signs
    ±1 that LAPACK leaves in its triangular factor. Nothing is lost for any orthonormal
    ``columns_DR``, so a trained R can become a base as well as a random one.
    ``ValueError`` if there are more columns than rows.
    """
    size, rank = columns_DR.shape
    if size < rank:
        raise ValueError(
            f"rank {rank} is larger than the hidden size {size}; choose at most {size}"
        )
    base_DR = torch.geqrf(_as_float64(columns_DR)).a.tril(-1)
    base_DR.diagonal().fill_(1)
    # Begins with the columns themselves, up to one sign each.
    unsigned_DR = rotation(torch.zeros_like(base_DR), base_DR)
    base_DR.diagonal().copy_((unsigned_DR * columns_DR).sum(0).sign())
    return base_DR.to(columns_DR.dtype)


def square_base(base_DR: Tensor) -> Tensor:
    """Return the D×D matrix B itself, which pyreft keeps; O(D²) memory."""
    y_RD = _reflectors(base_DR.mT)
    t_inverse_RR = _half_triangle(y_RD @ y_RD.mT)
    b_DD = -y_RD.mT @ solve_triangular(t_inverse_RR, y_RD, upper=True)
    b_DD.diagonal().add_(1)
    b_DD[:, : base_DR.shape[1]] *= base_DR.diagonal()
    return b_DD.to(base_DR.dtype)


def random_base(size: int, rank: int) -> Tensor:
    """:func:`compact_base` of a uniformly random matrix, as pyreft starts (float32)."""
    columns_DR = torch.empty(size, rank, dtype=torch.float32)
    return compact_base(torch.nn.init.orthogonal_(columns_DR))
