import pytest
import torch
from torch.nn.utils import parametrizations

from axolotl_reft.core.rotation import (
    compact_base,
    random_base,
    rotation,
    rotations,
    square_base,
)

SHAPES = [(64, 4), (16, 16), (8, 1), (4096, 8)]


def orthonormality_error(matrix):
    wide = matrix.detach().double()
    return (wide.T @ wide - torch.eye(wide.shape[1])).abs().max().item()


@pytest.mark.parametrize(("size", "rank"), SHAPES)
def test_columns_are_orthonormal_whatever_the_vectors(size, rank):
    torch.manual_seed(0)
    base = random_base(size, rank)
    for scale in (0.0, 0.01, 1.0, 100.0):
        vectors = torch.randn(size, rank) * scale
        assert orthonormality_error(rotation(vectors, base)) < 1e-6


@pytest.mark.parametrize(("size", "rank"), SHAPES)
def test_zero_vectors_give_back_the_matrix_of_the_base(size, rank):
    torch.manual_seed(0)
    matrix = torch.nn.init.orthogonal_(torch.empty(size, rank))
    got = rotation(torch.zeros(size, rank), compact_base(matrix))
    assert (got - matrix).abs().max() < 1e-6


def test_a_base_that_is_already_triangular():
    """LAPACK uses no reflection at all for such columns."""
    for signs in ([1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]):
        matrix = torch.zeros(6, 2).diagonal_scatter(torch.tensor(signs))
        assert torch.equal(rotation(torch.zeros(6, 2), compact_base(matrix)), matrix)


def test_more_columns_than_rows_are_refused():
    with pytest.raises(ValueError, match="rank 5 is larger than the hidden size 4"):
        compact_base(torch.eye(4, 5))


class _Matrix(torch.nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.weight = torch.nn.Parameter(matrix)


def test_matrix_and_gradient_agree_with_torch():
    torch.manual_seed(0)
    size, rank = 24, 5
    theirs = parametrizations.orthogonal(_Matrix(torch.randn(size, rank)))
    base = compact_base(theirs.weight.detach())
    vectors = torch.randn(size, rank) * 0.5
    with torch.no_grad():
        theirs.parametrizations.weight[0].base.copy_(square_base(base))
        original = theirs.parametrizations.weight.original
        original.copy_(vectors.tril(-1) - torch.zeros_like(vectors).fill_diagonal_(1))
    ours = vectors.clone().requires_grad_()
    weights = torch.randn(size, rank)
    (rotation(ours, base) * weights).sum().backward()
    (theirs.weight * weights).sum().backward()
    assert (rotation(ours, base) - theirs.weight).abs().max() < 1e-6
    assert (ours.grad - original.grad.tril(-1)).abs().max() < 1e-5
    assert ours.grad.triu().abs().max() == 0


@pytest.mark.parametrize("rank", [1, 3])
def test_in_float64_the_gradient_is_that_of_finite_differences(rank):
    torch.manual_seed(0)
    base = random_base(7, rank)
    vectors = torch.randn(7, rank)
    wide = vectors.double().requires_grad_()
    got = rotation(wide, base.double())
    assert (got - rotation(vectors, base)).abs().max() < 1e-6
    assert torch.autograd.gradcheck(lambda x: rotation(x, base.double()), wide)


def test_several_at_once_are_each_what_they_are_alone():
    torch.manual_seed(0)
    bases = [random_base(12, 3) for _ in range(4)]
    vectors = [torch.randn(12, 3, requires_grad=True) for _ in range(4)]
    weights = torch.randn(4, 3, 12)
    matrices = rotations(vectors, bases)
    (matrices * weights).sum().backward()
    for one, base, weight, matrix in zip(
        vectors, bases, weights, matrices, strict=True
    ):
        alone = one.detach().clone().requires_grad_()
        assert torch.allclose(matrix, rotation(alone, base).T, atol=1e-6)
        (rotation(alone, base).T * weight).sum().backward()
        assert torch.allclose(one.grad, alone.grad, atol=1e-6)


def test_a_second_derivative_is_refused_and_not_wrong():
    vectors = torch.randn(6, 2, requires_grad=True)
    matrix = rotation(vectors, random_base(6, 2))
    (gradient,) = torch.autograd.grad(matrix.square().sum(), vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_square_base_is_orthogonal_and_begins_with_the_columns():
    torch.manual_seed(0)
    matrix = torch.nn.init.orthogonal_(torch.empty(20, 3))
    square = square_base(compact_base(matrix))
    assert orthonormality_error(square) < 1e-6
    assert (square[:, :3] - matrix).abs().max() < 1e-6


def test_memory_is_linear_in_the_size():
    assert random_base(8192, 8).numel() == 8192 * 8
