import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from axolotl_reft.core import scatter
from axolotl_reft.core.scatter import EditIndices


def edit(hidden, indices, interventions, may_be_unused=True):
    return scatter.edit(
        hidden, EditIndices(tuple(indices), may_be_unused), interventions
    )


def edit_exactly(hidden, indices, interventions):
    """Where no slot is unused."""
    return edit(hidden, indices, interventions, may_be_unused=False)


def double(hidden):
    return 2 * hidden


def negate(hidden):
    return -hidden


def plain_edit(hidden, indices, interventions):
    """By torch's own operations, whose derivatives are torch's."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    padded = F.pad(flat, (0, 0, 0, 1))
    new = torch.cat(
        [f(padded[index]) for index, f in zip(indices, interventions, strict=True)]
    )
    return padded.index_copy(0, torch.cat(indices), new)[:-1].view(hidden.shape)


def test_edit_replaces_the_named_vectors_alone():
    hidden = torch.arange(24.0).view(2, 4, 3)
    before = hidden.clone()
    got = edit(hidden, [torch.tensor([1]), torch.tensor([6, 7])], [double, negate])
    flat, expected = got.view(8, 3), before.view(8, 3).clone()
    expected[1] *= 2
    expected[6:] *= -1
    assert torch.equal(flat, expected)
    assert torch.equal(hidden, before)


def test_unused_slots_neither_write_nor_send_gradients():
    hidden = torch.randn(1, 3, 2, requires_grad=True)
    scale = torch.ones(2, requires_grad=True)
    index = torch.tensor([1, 3, 3])
    got = edit(hidden, [index], [lambda rows: rows * scale + scale])
    got.sum().backward()
    assert torch.equal(got[0, [0, 2]], hidden[0, [0, 2]])
    assert torch.allclose(scale.grad, hidden[0, 1].detach() + 1)


def test_unused_slots_read_nothing():
    """Else a padding token's overflow would reach the parameters as 0 · inf."""
    hidden = torch.full((1, 3, 2), torch.inf)
    hidden[0, 0] = 1.0
    scale = torch.ones(2, requires_grad=True)
    got = edit(hidden, [torch.tensor([0, 3])], [lambda rows: rows * scale])
    got[0, 0].sum().backward()
    assert torch.equal(scale.grad, torch.ones(2))


def test_no_position_at_all_keeps_the_parameters_in_the_graph():
    """Distributed training hangs on parameters that a step does not use."""
    hidden = torch.randn(1, 3, 2)
    scale = torch.ones(2, requires_grad=True)
    edit(hidden, [torch.tensor([], dtype=torch.long)], [lambda h: h * scale]).sum(
    ).backward()  # fmt: skip
    assert torch.equal(scale.grad, torch.zeros(2))


@pytest.mark.parametrize(
    ("indices", "mine"),
    [
        (([1, 8, 8],), edit),
        (([1, 8], [5, 2]), edit),
        (([],), edit),
        (([1, 7], [5, 2]), edit_exactly),
        (([],), edit_exactly),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_plain_operations_own(indices, mine, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(2, 4, 3).to(dtype)
    scale = torch.randn(3).to(dtype)
    weights = torch.randn(2, 4, 3).to(dtype)
    index = [torch.tensor(one, dtype=torch.long) for one in indices]
    results = []
    for function in (mine, plain_edit):
        own = hidden.clone().requires_grad_()
        trained = scale.clone().requires_grad_()
        kinds = [lambda rows: (rows * trained).sin(), lambda rows: rows**2 + trained]  # noqa: B023
        # A residual stream goes on beside its edit, and is read before it.
        stream = own * 1
        out = function(stream, index, kinds[: len(index)])
        ((out + out.square() + stream.sin()) * weights).sum().backward()
        results.append((out, own.grad, trained.grad))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_first_and_second_derivatives_are_those_of_finite_differences():
    hidden = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(3, dtype=torch.float64, requires_grad=True)
    index = [torch.tensor([1, 8]), torch.tensor([5, 2])]

    def function(hidden, scale):
        kinds = [lambda rows: (rows * scale).sin(), lambda rows: rows**2]
        return edit(hidden, index, kinds)

    assert torch.autograd.gradcheck(function, (hidden, scale))
    assert torch.autograd.gradgradcheck(function, (hidden, scale))


@pytest.mark.parametrize("mine", [edit, edit_exactly])
def test_what_comes_out_may_be_changed_in_place(mine):
    """As some models do with their residual stream."""
    hidden = torch.randn(1, 3, 2, requires_grad=True)
    out = mine(hidden * 1, [torch.tensor([1])], [double])
    out += 1
    out.sum().backward()
    assert torch.equal(hidden.grad[0], torch.tensor([[1.0] * 2, [2.0] * 2, [1.0] * 2]))


class _Passes(TorchDispatchMode):
    """The operations that write a tensor of at least so many numbers."""

    CHEAP = {"new_empty", "index_copy_", "_unsafe_view", "view", "slice", "detach"}

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        large = isinstance(out, torch.Tensor) and out.numel() >= self.size
        if large and name not in self.CHEAP:
            self.found.append(name)
        return out


@pytest.mark.parametrize(
    ("mine", "copies"), [(edit, "copy_"), (edit_exactly, "index_copy")]
)
def test_each_direction_copies_the_stream_once_and_keeps_none_of_it(mine, copies):
    hidden = torch.randn(1, 512, 64, requires_grad=True)
    stream, weights, kept = hidden * 1, torch.randn(1, 512, 64), []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
        ),
        _Passes(hidden.numel()) as forward,
    ):
        out = mine(stream, [torch.arange(4)], [torch.sin])
    with _Passes(hidden.numel()) as backward:
        torch.autograd.grad(out, stream, weights)
    assert forward.found == backward.found == [copies]
    assert max(kept) == 4 * 64
