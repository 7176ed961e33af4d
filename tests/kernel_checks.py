"""The kernels against the operations they replace: ``pytest kernel_checks.py`` on a
GPU, or anywhere with ``TRITON_INTERPRET=1``. A process of its own, which
test_kernels.py starts: Triton decides at its import whether it interprets.
"""

import gc
import weakref

import pytest
import torch
from conftest import LAYERS, VOCABULARY, build_adapter, build_model
from torch.testing import assert_close

from axolotl_reft import LoreftConfig
from axolotl_reft.core import interventions, rotation
from axolotl_reft.core import scatter as editing
from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.inspect.edit_size import edit_sizes
from axolotl_reft.kernels import dispatch as fused
from axolotl_reft.kernels import launch as launches
from axolotl_reft.kernels import rotation_launch as rotation_launches
from axolotl_reft.tuner.config import INTERVENTIONS

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
    assert fused._place([usual[0], elsewhere]) is None
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


def vectors_and_bases(count, size, rank, scale=0.3):
    torch.manual_seed(0)
    vectors = [random(size, rank) * scale for _ in range(count)]
    bases = [rotation.random_base(size, rank).to(DEVICE) for _ in range(count)]
    return vectors, bases


def rotated(vectors, bases):
    """Matrices as rows, and the gradients of the vectors, by what is taken for them."""
    matrices, kept, backward = fused.rotate(vectors, bases)
    weights = torch.linspace(-1, 1, matrices.numel(), device=DEVICE).view_as(matrices)
    return matrices, backward(kept, weights)


def refuse(*_):
    raise AssertionError("in another way")


@pytest.mark.parametrize(
    ("count", "size", "rank"),
    [(3, 70, 3), (1, 20, 8), (2, 300, 8), (1, 64, 32), (2, 40, 20), (1, 16, 16)]
    + [(1, 130, 1), (2, 2, 2), (1, 32, 32)],
)
@pytest.mark.parametrize("scale", [0, 0.3, 5])
def test_rotations_and_their_gradients(count, size, rank, scale, monkeypatch, without):
    monkeypatch.setattr(fused, "MOST_RANK_ROTATED", 32)
    vectors, bases = vectors_and_bases(count, size, rank, scale)
    with monkeypatch.context() as patches:
        patches.setattr(rotation, "rotate", refuse)
        got = rotated(vectors, bases)
    without()
    # Both are sums of float64.
    assert_close(got, rotated(vectors, bases), atol=1e-7, rtol=1e-6)
    # Else autograd would copy them.
    assert got[1].is_contiguous()


def test_rotations_with_numbers_that_are_not_used():
    vectors, bases = vectors_and_bases(2, 30, 4)
    expected = rotated(vectors, bases)
    for one in vectors:
        one += torch.full_like(one, torch.nan).triu()
    assert_close(rotated(vectors, bases), expected, atol=0, rtol=0)


def test_rotations_that_kernels_do_not_take(monkeypatch, without):
    vectors, bases = vectors_and_bases(2, 40, 4)
    expected = rotated(vectors, bases)
    with monkeypatch.context() as patches:
        patches.setattr(rotation_launches, "rotate", refuse)
        turned = vectors[0].T.contiguous().T
        assert_close(rotated([turned, vectors[1]], bases), expected)
        doubles = [[one.double() for one in some] for some in (vectors, bases)]
        assert_close(rotated(*doubles)[0], expected[0].double())
        rotated(*vectors_and_bases(1, 40, fused.MOST_RANK_ROTATED + 1))
        on_meta = [one.to("meta") for one in bases]
        assert not rotation_launches.can_be_addressed([*vectors, *on_meta])
        without()
        assert_close(rotated(vectors, bases), expected)


def test_vectors_that_lie_elsewhere_than_before():
    vectors, bases = vectors_and_bases(2, 30, 4)
    expected = rotated(vectors, bases)
    # None of the first ones is gone, so that these are in other places.
    others = [2 * one for one in vectors]
    assert not torch.allclose(rotated(others, bases)[0], expected[0])
    assert_close(rotated(vectors, bases), expected, atol=0, rtol=0)


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
    """Of how many layers edits were made ready at once, in the order of that."""
    counts, at = [], launches.Edits.at

    def note(edits, *given):
        counts.append(len(edits._interventions))
        return at(edits, *given)

    monkeypatch.setattr(launches.Edits, "at", note)
    return counts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [LAYERS]),
        ({"tied_weights": True}, [LAYERS]),
        ({"positions": "l2", "intervention": "noreft"}, [LAYERS]),
        ({"rank": {0: 20, "all": 3}}, [1, LAYERS - 1]),
        ({"component": "mlp_output", "layers": "1-2"}, [1, 1]),
    ],
    ids=str,
)
def test_a_model_s_training_step_and_answer(options, expected, without, together):
    got = train_a_step(**options)
    # In training, and for the prompt that is answered; the answer has no edits.
    assert together == expected * 2
    without()
    assert_close(got, train_a_step(**options), atol=1e-4, rtol=1e-4)
    assert together == expected * 2


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


@pytest.mark.parametrize("several", [False, True])
def test_rotations_are_one_computation(several, computed, monkeypatch):
    model, batch = build_training(tied_weights=True)
    if several:
        model.add_adapter("other", LoreftConfig(positions="l1", layers="0"))
        model.base_model.set_adapter(["default", "other"])
    monkeypatch.setattr(interventions, "rotation", refuse)
    model(**batch).loss.backward()
    # The first layer has two edits, which are not made ready with the others'.
    assert computed == ([LAYERS - 1, 2] if several else [LAYERS])


def test_a_training_step_begins_with_the_rotations(computed):
    """A device is at work on the step before then. A forward on a filled cache has
    none."""
    model, batch = build_training()
    before = []
    first = model.base_model.model.model.layers[0].base_layer
    first.register_forward_pre_hook(lambda *_: before.append(list(computed)))
    model(**batch)
    with torch.no_grad():
        model(**batch)
    with model.disable_adapter():
        model(**batch)
    assert before == [[LAYERS]] * 3
    assert computed == [LAYERS]
    cache = model(input_ids=batch["input_ids"]).past_key_values
    model(input_ids=batch["input_ids"][:, :1], past_key_values=cache)
    assert before[3:] == [[LAYERS] * 2] * 2


def test_numbers_of_some_layers_alone(without):
    def run(model, batch):
        found = list(trained(model).values())
        return torch.autograd.grad(model(**batch).loss, found[-3:])

    compare(run, without)


def test_a_layer_that_comes_twice(without, together, computed):
    def run(model, batch):
        base = model.base_model.model.model
        base.layers = torch.nn.ModuleList([base.layers[0], base.layers[1]] * 2)
        base.config.num_hidden_layers = 4
        return step(model, batch)

    compare(run, without, tied_weights=True)
    # The second time by itself.
    assert together == [LAYERS, 1, 1]
    assert computed == [LAYERS] * 2


def test_several_adapters_at_once(without, together):
    def run(model, batch):
        model.add_adapter("other", LoreftConfig(positions="l1", layers="0"))
        model.base_model.set_adapter(["default", "other"])
        return step(model.train(), batch)

    compare(run, without)
    # The first layer by itself, by each.
    assert together == [1, 1, LAYERS - 1]


def test_adapters_of_different_layers(without, together):
    def run(model, batch):
        model.add_adapter("other", LoreftConfig(positions="l1", layers="1", rank=4))
        model.base_model.set_adapter(["default", "other"])
        return step(model.train(), batch)

    compare(run, without, layers="0,2", positions="f2+l2", rank=4)
    assert together == [2, 1]


def test_adapters_by_row(without):
    def run(model, batch):
        model.add_adapter("other", LoreftConfig(positions="l1"))
        names = ["other", "default"]
        with torch.no_grad():
            return model.eval()(input_ids=batch["input_ids"], adapter_names=names)[0]

    compare(run, without)


@pytest.mark.usefixtures("_memory_full_of_nan")
def test_beside_a_layer_that_is_compiled(together):
    def run(**compiling):
        model, batch = build_training()
        if compiling:
            model.base_model.model.model.layers[1].compile(**compiling)
        return step(model, batch)

    torch._dynamo.reset()
    got = run(fullgraph=True, backend="eager")
    assert together == [LAYERS]
    assert_close(got, run(), atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_many_rows_are_each_layer_s_own(without, together, computed, monkeypatch):
    monkeypatch.setattr(fused, "_MOST_TOGETHER", 0)
    compare(step, without)
    assert together == [1] * LAYERS
    # Ahead, in vain; once it is known how many rows there are; and without kernels.
    assert computed == [LAYERS] * 3


def test_decode_steps_of_layers_that_a_hook_watches():
    """Their own call, which has nothing to edit, is made then."""
    model, batch = build_training()
    asked = {"input_ids": batch["input_ids"], "max_new_tokens": 4, "do_sample": False}
    expected = model.eval().generate(**asked)
    calls = []
    for layer in model.base_model.model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(**asked), expected)
    assert len(calls) == 4 * LAYERS


def test_layers_on_another_device_are_not_planned():
    class Layer:
        def indices(self, name):
            return [torch.tensor([1], device=DEVICE)]

    hidden, layer = random(1, 4, 70), Layer()
    groups = fused.prepare({layer: ("default", build_interventions("loreft", 1))})
    assert fused.plan(hidden.to("meta"), groups) == {}
    assert set(fused.plan(hidden, groups)) == {layer}


def test_hidden_states_of_another_kind_than_expected():
    interventions = build_interventions("loreft", 1)
    indices = [torch.tensor([1], device=DEVICE)]
    hidden = random(1, 4, 70)
    ready = launches.Edits(fused._kernels(), [interventions]).at(hidden, indices)
    other = hidden.to(torch.bfloat16)
    expected = editing.edit(other, indices, interventions)
    assert torch.equal(ready.edit(0, other), expected)


@pytest.mark.parametrize("which", ["weight", "rotation"])
def test_numbers_that_changed_before_backward_are_refused(which):
    model, batch = build_training()
    loss = model(**batch).loss
    with torch.no_grad():
        for name, number in trained(model).items():
            if name.endswith(which):
                number.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backward", [True, False])
def test_a_step_leaves_nothing_behind(backward, monkeypatch):
    """And not only once Python looks for cycles, which is too late on a GPU."""
    rooms, made = [], launches._Room.__init__

    def note(room, *given):
        rooms.append(weakref.ref(room))
        made(room, *given)

    monkeypatch.setattr(launches._Room, "__init__", note)
    model, batch = build_training()
    gc.collect()
    gc.disable()
    try:
        loss = model(**batch).loss
        assert [room() is not None for room in rooms] == [True]
        if backward:
            loss.backward()
        del loss
        assert rooms[0]() is None
    finally:
        gc.enable()
