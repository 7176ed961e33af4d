"""The kernels against the operations they replace: ``pytest kernel_checks.py`` on a
GPU, or anywhere with ``TRITON_INTERPRET=1``. A process of its own, which
test_kernels.py starts: Triton decides at its import whether it interprets.
"""

import pytest
import torch
from conftest import VOCABULARY, build_adapter, build_model
from torch.testing import assert_close

from axolotl_reft import editing, fused
from axolotl_reft.config import INTERVENTIONS
from axolotl_reft.edit_size import edit_sizes
from axolotl_reft.interventions import INTERVENTION_CLASSES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums of float32 differ in their order.
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture
def without(monkeypatch):
    """A function that turns the kernels off."""
    return lambda: monkeypatch.setattr(fused, "_kernels", lambda: None)


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


def edited(function, hidden, indices, interventions, weights):
    """What comes out, and the gradients of the hidden states and of all numbers."""
    hidden = hidden.clone().requires_grad_()
    numbers = [p for one in interventions for p in one.parameters()]
    got = function(hidden, indices, interventions)
    gradients = torch.autograd.grad(got, [hidden, *numbers], weights)
    return [got, *gradients]


ROWS = {
    "one side": [[3, 17, 4]],
    "two sides": [[0, 9], [8, 2, 10]],
    "several rows a program": [[*range(0, 280, 2)], [*range(1, 261, 2)]],
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
def test_edits_and_their_gradients(name, where, dtype, without):
    indices = [
        torch.tensor(one, dtype=torch.long, device=DEVICE) for one in ROWS[where]
    ]
    interventions = build_interventions(name, len(indices))
    hidden = random(3, 100, 70).to(dtype)
    weights = random(3, 100, 70).to(dtype)
    assert fused.can_edit(hidden, interventions)
    got = edited(fused.edit, hidden, indices, interventions, weights)
    without()
    expected = edited(editing.edit, hidden, indices, interventions, weights)
    close = CLOSE[dtype]
    assert_close(got, expected, atol=close, rtol=close)
    assert got[0].dtype == dtype


def test_what_is_not_edited_is_not_changed():
    hidden = random(2, 10, 70)
    indices = [torch.tensor([4, 11], device=DEVICE)]
    got = fused.edit(hidden, indices, build_interventions("loreft", 1)).flatten(0, 1)
    changed = (got != hidden.flatten(0, 1)).any(1).nonzero().flatten().tolist()
    assert changed == [4, 11]


def test_an_unused_slot_s_gradient_is_not_that_of_infinite_states():
    (one,) = build_interventions("loreft", 1)
    hidden = torch.full((1, 4, 70), torch.inf, device=DEVICE)
    hidden[0, 0] = 1.0
    indices = [torch.tensor([0, 4], device=DEVICE)]
    fused.edit(hidden, indices, [one])[0, 0].sum().backward()
    assert all(p.grad.isfinite().all() for p in one.parameters())


def test_frozen_numbers_and_hidden_states_without_gradients():
    interventions = build_interventions("loreft", 1)
    indices = [torch.tensor([1], device=DEVICE)]
    fused.edit(random(1, 4, 70), indices, interventions).sum().backward()
    assert interventions[0].weight.grad.any()
    interventions[0].requires_grad_(False).weight.grad = None
    hidden = random(1, 4, 70, requires_grad=True)
    fused.edit(hidden, indices, interventions).sum().backward()
    assert interventions[0].weight.grad is None
    assert not torch.equal(hidden.grad[0, 1], torch.ones(70, device=DEVICE))


def test_hidden_states_in_any_layout(without):
    hidden = random(5, 70, 4).permute(2, 0, 1)
    indices = [torch.tensor([1, 19], device=DEVICE)]
    interventions = build_interventions("direft", 1)
    weights = random(4, 70, 5).mT
    got = edited(fused.edit, hidden, indices, interventions, weights)
    without()
    expected = edited(editing.edit, hidden, indices, interventions, weights)
    assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_numbers_in_any_layout(without):
    (one,) = build_interventions("noreft", 1)
    for parameter in (one.weight, one.proj_weight):
        parameter.data = parameter.data.mT.contiguous().mT
    indices = [torch.tensor([1, 4, 19], device=DEVICE)[::2]]
    hidden, weights = random(4, 5, 70), random(4, 5, 70)
    got = edited(fused.edit, hidden, indices, [one], weights)
    without()
    expected = edited(editing.edit, hidden, indices, [one], weights)
    assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_a_rotation_kept_for_inference_is_used(name):
    (one,) = build_interventions(name, 1)
    hidden = random(1, 4, 70)
    indices = [torch.tensor([2], device=DEVICE)]
    with torch.no_grad():
        one.eval()
        first = fused.edit(hidden, indices, [one])
        kept = getattr(one, "_kept", None)
        assert torch.equal(fused.edit(hidden, indices, [one]), first)
        assert getattr(one, "_kept", None) is kept
        one.bias += 1
        if kept:
            one.rotation += 1
        assert not torch.equal(fused.edit(hidden, indices, [one]), first)
    assert (kept is not None) == hasattr(one, "rotation")


def test_who_watches_edits_is_told_of_them(without):
    interventions = build_interventions("loreft", 2)
    hidden = random(3, 20, 70)
    indices = [torch.tensor(one, device=DEVICE) for one in ([0, 9, 60], [8, 2, 10, 60])]

    def told(function):
        seen = []
        for one in interventions:
            one.on_edit = lambda *both: seen.append(edit_sizes(*both))
        function(hidden, indices, interventions)
        return seen

    assert fused.can_edit(hidden, interventions)
    got = told(fused.edit)
    without()
    expected = told(editing.edit)
    assert [sizes.isnan().tolist() for sizes in got] == [
        [False, False, True],
        [False, False, False, True],
    ]
    assert_close(got, expected, equal_nan=True)


def test_where_the_kernels_are_not_used(monkeypatch):
    hidden = random(1, 4, 70)
    usual = build_interventions("loreft", 2)
    assert fused.can_edit(hidden, usual)
    for unusual in (
        build_interventions("loreft", 1, act_fn="gelu"),
        build_interventions("loreft", 1, rank=33),
        [one.train() for one in build_interventions("loreft", 1, dropout=0.1)],
    ):
        assert not fused.can_edit(hidden, unusual)
    assert fused.can_edit(hidden, [one.eval() for one in unusual])
    elsewhere = build_interventions("loreft", 1)[0].to("meta")
    assert not fused.can_edit(hidden, [elsewhere])
    for register in (
        usual[0].register_forward_hook,
        usual[0].register_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert not fused.can_edit(hidden, usual)
        handle.remove()
    fused._kernels.cache_clear()
    monkeypatch.setenv("AXOLOTL_REFT_KERNELS", "0")
    assert not fused.can_edit(hidden, usual)
    fused._kernels.cache_clear()


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied_weights": True},
        {"positions": "l2", "intervention": "noreft"},
        {"rank": 20},
        {"component": "mlp_output", "layers": "1-2"},
    ],
    ids=str,
)
def test_a_model_s_training_step_and_answer(options, without, monkeypatch):
    used, edit = [], fused.edit
    monkeypatch.setattr(fused, "edit", lambda *a: used.append(a) or edit(*a))
    got = train_a_step(**options)
    assert used
    without()
    assert_close(got, train_a_step(**options), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers(component, use_reentrant):
    def gradients(**checkpointing):
        model = build_adapter(build_model().to(DEVICE), component=component).train()
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
        torch.manual_seed(0)
        ids = torch.randint(1, VOCABULARY, (2, 12), device=DEVICE)
        labels = ids.where(torch.arange(12, device=DEVICE) > 6, -100)
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    assert_close(gradients(use_reentrant=use_reentrant), gradients())
