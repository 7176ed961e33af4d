"""The kernels against the operations that they replace.

``pytest kernel_checks.py`` on a GPU, or anywhere with ``TRITON_INTERPRET=1``; in a
process of its own, which test_edit.py starts: Triton decides at its import whether it
interprets.
"""

import pytest
import torch
from conftest import LAYERS, VOCABULARY, build_adapter, build_model
from torch.testing import assert_close

from axolotl_reft.core.affine import affine_stack
from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.core.scatter import EditIndices
from axolotl_reft.core.scatter import edit as edit_by_operations
from axolotl_reft.core.stacked_edits import StackedEdits
from axolotl_reft.kernels import dispatch, launch
from axolotl_reft.kernels.launch import TritonWorkspace
from axolotl_reft.settings.spec import INTERVENTIONS
from axolotl_reft.tuner import executor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums of float32 differ in their order.
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture
def without(monkeypatch):
    """A function that turns the kernels off."""
    return lambda: monkeypatch.setattr(dispatch, "_triton_workspace", lambda: None)


def random(*shape, **options):
    return torch.randn(*shape, device=DEVICE, **options)


def build_interventions(name, count, size=70, rank=3, **settings):
    torch.manual_seed(0)
    found = []
    for _ in range(count):
        one = INTERVENTION_CLASSES[name](
            embed_dim=size, low_rank_dimension=rank, **settings
        ).to(DEVICE)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        found.append(one)
    return found


def by_kernels(hidden, indices, interventions):
    edits = StackedEdits(affine_stack(interventions), 1, TritonWorkspace)
    return edits.edit(0, hidden, indices)


def edited(function, hidden, indices, interventions, weights):
    """What comes out, and the gradients of the hidden states and all parameters."""
    hidden = hidden.clone().requires_grad_()
    parameters = [p for one in interventions for p in one.parameters()]
    got = function(hidden, indices, interventions)
    gradients = torch.autograd.grad(got, [hidden, *parameters], weights)
    return [got, *gradients]


def at(*sides):
    """Indices of each side, some of which may be unused slots."""
    return EditIndices(
        tuple(torch.tensor(one, dtype=torch.long, device=DEVICE) for one in sides),
        may_be_unused=True,
    )


ROWS = {
    "one side": [[3, 17, 4]],
    "two sides": [[0, 9], [8, 2, 10]],
    "several rows a program": [[*range(0, 280, 8)], [*range(1, 261, 8)]],
    "unused slots": [[5, 300, 300], [300, 7]],
    "a side without rows": [[], [3]],
    "no rows": [[], []],
}


@pytest.mark.parametrize(
    ("where", "dtype"),
    [
        *((where, torch.float32) for where in ROWS),
        ("two sides", torch.bfloat16),
        ("several rows a program", torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_edits_and_their_gradients(name, where, dtype, monkeypatch):
    monkeypatch.setattr(launch, "_FEW_ROWS", 64)
    interventions = build_interventions(name, len(ROWS[where]))
    hidden = random(3, 100, 70).to(dtype)
    weights = random(3, 100, 70).to(dtype)
    given = hidden, at(*ROWS[where]), interventions, weights
    got = edited(by_kernels, *given)
    expected = edited(edit_by_operations, *given)
    close = CLOSE[dtype]
    assert_close(got, expected, atol=close, rtol=close)
    assert got[0].dtype == dtype


def test_what_is_not_edited_is_not_changed():
    hidden = random(2, 10, 70)
    got = by_kernels(hidden, at([4, 11]), build_interventions("loreft", 1))
    changed = (got != hidden).flatten(0, 1).any(1).nonzero().flatten().tolist()
    assert changed == [4, 11]


def test_an_unused_slot_s_gradient_is_not_that_of_infinite_states():
    (one,) = build_interventions("loreft", 1)
    hidden = torch.full((1, 4, 70), torch.inf, device=DEVICE)
    hidden[0, 0] = 1.0
    by_kernels(hidden, at([0, 4]), [one])[0, 0].sum().backward()
    assert all(p.grad.isfinite().all() for p in one.parameters())


def test_frozen_parameters_and_hidden_states_without_gradients():
    interventions = build_interventions("loreft", 1)
    by_kernels(random(1, 4, 70), at([1]), interventions).sum().backward()
    assert interventions[0].weight.grad.any()
    interventions[0].requires_grad_(False).weight.grad = None
    hidden = random(1, 4, 70, requires_grad=True)
    by_kernels(hidden, at([1]), interventions).sum().backward()
    assert interventions[0].weight.grad is None
    assert not torch.equal(hidden.grad[0, 1], torch.ones(70, device=DEVICE))


def test_hidden_states_in_any_layout():
    hidden, weights = random(5, 70, 4).permute(2, 0, 1), random(4, 70, 5).mT
    given = hidden, at([1, 19]), build_interventions("direft", 1), weights
    expected = edited(edit_by_operations, *given)
    assert_close(edited(by_kernels, *given), expected, atol=2e-5, rtol=2e-5)


def test_parameters_and_indices_in_any_layout():
    (one,) = build_interventions("noreft", 1)
    for parameter in (one.weight, one.proj_weight):
        parameter.data = parameter.data.mT.contiguous().mT
    indices = EditIndices((torch.tensor([1, 4, 19], device=DEVICE)[::2],))
    given = random(4, 5, 70), indices, [one], random(4, 5, 70)
    expected = edited(edit_by_operations, *given)
    assert_close(edited(by_kernels, *given), expected, atol=2e-5, rtol=2e-5)


def test_where_the_kernels_are_used(monkeypatch):
    device = torch.device(DEVICE)
    assert dispatch.workspace_for(device, 32) is TritonWorkspace
    assert dispatch.workspace_for(device, 33) is not TritonWorkspace
    assert dispatch.workspace_for(torch.device("meta"), 8) is not TritonWorkspace
    dispatch._triton_workspace.cache_clear()
    monkeypatch.setenv("AXOLOTL_REFT_KERNELS", "0")
    assert dispatch.workspace_for(device, 8) is not TritonWorkspace
    dispatch._triton_workspace.cache_clear()


def train_a_step(**options):
    model = build_adapter(build_model().to(DEVICE), **options).train()
    torch.manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (2, 12), device=DEVICE)
    labels = ids.clone()
    labels[0, :5], labels[1, :8] = -100, -100
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.eval()
    with torch.no_grad():
        answer = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    return loss, gradients, answer


@pytest.fixture
def together(monkeypatch):
    """How many layers each workspace of the kernels is for, in their order."""
    counts, made = [], TritonWorkspace.open

    def note(workspace, *given):
        counts.append(workspace.layers)
        return made(workspace, *given)

    monkeypatch.setattr(TritonWorkspace, "open", note)
    return counts


@pytest.mark.parametrize(
    ("options", "training", "answering"),
    [
        ({}, [LAYERS], [LAYERS]),
        ({"tied_weights": True}, [LAYERS], [LAYERS]),
        ({"positions": "l2", "intervention": "noreft"}, [LAYERS], [LAYERS]),
        ({"rank": {0: 20, "all": 3}}, [1, LAYERS - 1], [1, LAYERS - 1]),
        ({"component": "mlp_output", "layers": "1-2"}, [1, 1], []),
    ],
    ids=str,
)
def test_a_model_s_training_step_and_answer(
    options, training, answering, without, together
):
    got = train_a_step(**options)
    # The prompt that is answered is edited; the answer has no edits.
    assert together == training + answering
    without()
    assert_close(got, train_a_step(**options), atol=1e-4, rtol=1e-4)
    assert together == training + answering


@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_checkpointed_layers(component):
    def gradients(**checkpointing):
        model = build_adapter(build_model().to(DEVICE), component=component).train()
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
        torch.manual_seed(0)
        ids = torch.randint(1, VOCABULARY, (2, 12), device=DEVICE)
        labels = ids.where(torch.arange(12, device=DEVICE) > 6, -100)
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    for use_reentrant in (True, False):
        assert_close(gradients(use_reentrant=use_reentrant), expected)


@pytest.fixture
def _memory_full_of_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def build_training(**options):
    """A model in training mode, and a batch for it."""
    model = build_adapter(build_model().to(DEVICE), **options).train()
    torch.manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (2, 12), device=DEVICE)
    labels = ids.where(torch.arange(12, device=DEVICE) > 6, -100)
    return model, {"input_ids": ids, "labels": labels, "use_cache": False}


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    """Those of a model's numbers, and forgotten there; zeros for none."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in trained(model).items()
    }
    model.zero_grad()
    return found


def step(model, batch):
    """The loss and the gradients of a training step."""
    loss = model(**batch).loss
    loss.backward()
    return loss, gradients(model)


def compare(run, without, **options):
    """What a function makes of a model and a batch, with the kernels and without."""
    got = run(*build_training(**options))
    without()
    assert_close(got, run(*build_training(**options)), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("_memory_full_of_nan")
def test_each_backward_is_one_of_its_own(without):
    def run(model, batch):
        states = model(**batch, output_hidden_states=True).hidden_states
        lower, upper = states[1].pow(3).sum(), states[LAYERS].pow(3).sum()
        # Of the hidden states alone: what layers keep for the numbers is not taken.
        torch.autograd.grad(upper, states[1], retain_graph=True)
        lower.backward(retain_graph=True)
        first = gradients(model)
        upper.backward(retain_graph=True)
        second = gradients(model)
        upper.backward()
        return first, second, gradients(model)

    compare(run, without)


def test_many_rows_are_each_layer_s_own(without, together, monkeypatch):
    monkeypatch.setattr(executor, "_MAX_TOGETHER", 0)
    compare(step, without)
    assert together == [1] * LAYERS


def test_a_layer_that_comes_twice(without, together):
    def run(model, batch):
        base = model.base_model.model.model
        base.layers = torch.nn.ModuleList([base.layers[0], base.layers[1]] * 2)
        base.config.num_hidden_layers = 4
        return step(model, batch)

    compare(run, without, tied_weights=True)
    # The second time by itself.
    assert together == [LAYERS, 1, 1]
