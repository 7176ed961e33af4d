"""Layers whose edits are made ready together compute what each does by itself."""

import gc
import weakref

import pytest
import torch
from conftest import HIDDEN, LAYERS, build_adapter, build_model
from torch.testing import assert_close

from axolotl_reft import LoreftConfig
from axolotl_reft.core.affine import affine_stack
from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.core.scatter import EditIndices, edit
from axolotl_reft.core.stacked_edits import Workspace
from axolotl_reft.tuner import executor
from axolotl_reft.tuner.executor import LayerGroup


@pytest.fixture
def without(monkeypatch):
    """A function that has each intervention make its own edits."""
    return lambda: monkeypatch.setattr(executor, "_group_key", lambda modules: None)


def step(model, tokens):
    """The loss and all gradients of a training step."""
    ids = tokens(2, 12)
    model.zero_grad()
    labels = ids.where(torch.arange(12) > 6, -100)
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [LAYERS]),
        ({"tied_weights": False}, [2 * LAYERS]),
        ({"positions": "all"}, [LAYERS]),
        ({"component": "block_input"}, [LAYERS]),
        ({"rank": {0: 2, "all": 3}}, [1, LAYERS - 1]),
        ({"dropout": 0.1, "act_fn": "gelu"}, [LAYERS]),
        ({"intervention": "noreft"}, []),
        # Within a layer: checkpointing would replay it when nothing is shared any more.
        ({"component": "mlp_output"}, [1] * LAYERS),
    ],
    ids=str,
)
def test_a_training_step_makes_them_once(settings, expected, computed, without, tokens):
    model = build_adapter(build_model(), **settings).train()
    torch.manual_seed(0)
    got = step(model, tokens)
    assert computed == expected
    without()
    torch.manual_seed(0)
    assert_close(got, step(model, tokens), atol=1e-6, rtol=1e-5)


def test_each_forward_makes_them_anew(computed, tokens):
    model = build_adapter(build_model()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = step(model, tokens)[0]
    optimizer.step()
    assert step(model, tokens)[0] != first
    assert computed == [LAYERS] * 2


def test_only_active_adapters_are_computed(computed, tokens):
    model = build_adapter(build_model()).train()
    model.add_adapter("other", LoreftConfig(positions="l1"))
    model.train()
    step(model, tokens)
    model.base_model.set_adapter(["default", "other"])
    step(model, tokens)
    model.set_adapter("other")
    step(model, tokens)
    with model.disable_adapter():
        assert not model(input_ids=tokens(1, 8)).logits.requires_grad
    # One computation for each adapter.
    assert computed == [LAYERS, LAYERS, LAYERS, LAYERS]


def test_beside_edits_within_checkpointed_layers(computed, tokens):
    """Made within a layer, they would not be there when that is replayed."""
    model = build_adapter(build_model(), component="mlp_output").train()
    model.add_adapter("outer", LoreftConfig(positions="l1"))
    model.base_model.set_adapter(["default", "outer"])
    expected = step(model.train(), tokens)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(step(model, tokens), expected)
    within = [1] * LAYERS
    # Those within are made once more for the replay.
    assert computed == [LAYERS, *within, LAYERS, *within, *within]


@torch.no_grad()
def test_without_gradients_the_stack_is_kept(computed, tokens):
    model = build_adapter(build_model()).eval()
    expected = model(input_ids=tokens(1, 8)).logits
    assert torch.equal(model(input_ids=tokens(1, 8)).logits, expected)
    assert computed == [LAYERS]
    for layer in model.base_model.model.model.layers:
        layer.intv_0["default"].bias.add_(1)
    assert not torch.equal(model(input_ids=tokens(1, 8)).logits, expected)
    assert computed == [LAYERS] * 2


@torch.no_grad()
def test_decode_steps_that_edit_every_token_keep_their_rotations(computed, tokens):
    model = build_adapter(build_model(), positions="all").eval()
    model.generate(input_ids=tokens(1, 8), max_new_tokens=4, pad_token_id=0)
    # For the prompt of all layers at once, and once more for the steps, by each layer.
    assert computed == [LAYERS] + [1] * LAYERS


def test_one_that_a_hook_watches_makes_its_own(computed, tokens):
    model = build_adapter(build_model(), tied_weights=False).train()
    expected = step(model, tokens)
    layers = model.base_model.model.model.layers
    layers[0].intv_0["default"].register_forward_hook(lambda *_: None)
    layers[1].intv_1["default"].register_forward_pre_hook(lambda *_: None)
    layers[2].intv_1["default"]._hf_hook = object()
    assert_close(step(model, tokens), expected)
    # A layer with such a side makes both sides by themselves.
    assert computed == [2 * LAYERS] + [1] * (2 * LAYERS)


def test_many_rows_are_each_layer_s_own(tokens, monkeypatch):
    """The same gradients, without keeping the rows of all layers."""
    model = build_adapter(build_model(), tied_weights=False).train()
    expected = step(model, tokens)
    monkeypatch.setattr(executor, "_MAX_TOGETHER", 0)
    assert_close(step(model, tokens), expected)


def test_hidden_states_of_another_kind_than_the_first_layer_s():
    modules = [build_intervention(), build_intervention()]
    group = LayerGroup(affine_stack(modules), [[module] for module in modules])
    indices = EditIndices((torch.tensor([1]),))
    group.edit(0, torch.randn(1, 4, 12), indices)
    h_BTD = torch.randn(1, 6, 12).to(torch.bfloat16)
    got = group.edit(1, h_BTD, indices)
    assert torch.equal(got, edit(h_BTD, indices, [modules[1]]))


def build_intervention():
    return INTERVENTION_CLASSES["loreft"](embed_dim=12, low_rank_dimension=3)


def test_a_layer_that_comes_twice(tokens):
    def gradients(**settings):
        model = build_adapter(build_model(), **settings).train()
        base = model.base_model.model.model
        base.layers = torch.nn.ModuleList([base.layers[0], base.layers[1]] * 2)
        base.config.num_hidden_layers = 4
        return step(model, tokens)

    got = gradients(tied_weights=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_group_key", lambda modules: None)
        expected = gradients(tied_weights=True)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_each_backward_is_one_of_its_own(tokens):
    """With what the forward kept, for part of the layers and more than once."""

    def run(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        states = model(tokens(2, 12), output_hidden_states=True).hidden_states
        lower, upper = states[1].pow(3).sum(), states[LAYERS].pow(3).sum()
        # Of the hidden states alone.
        torch.autograd.grad(upper, states[1], retain_graph=True)
        some = [
            torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
            for loss in (lower, upper, upper)
        ]
        return [g for grads in some for g in grads]

    got = run(build_adapter(build_model(), tied_weights=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_group_key", lambda modules: None)
        expected = run(build_adapter(build_model(), tied_weights=False))
    for one, other in zip(got, expected, strict=True):
        # A group's gradients are there for all of its layers.
        other = torch.zeros_like(one) if other is None else other
        assert_close(one, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("which", ["weight", "rotation"])
def test_parameters_that_change_before_backward_do_not_change_it(which, tokens):
    def gradients(changes):
        model = build_adapter(build_model()).train()
        ids = tokens(2, 12)
        labels = ids.where(torch.arange(12) > 6, -100)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        if changes:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith(f"{which}") and parameter.requires_grad:
                        parameter.add_(1)
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize("backward", [True, False])
def test_a_step_leaves_nothing_behind(backward, tokens, monkeypatch):
    """And not only once Python looks for cycles, which is too late on a GPU."""
    made, init = [], Workspace.__init__

    def note(workspace, *given):
        made.append(weakref.ref(workspace))
        init(workspace, *given)

    monkeypatch.setattr(Workspace, "__init__", note)
    model = build_adapter(build_model()).train()
    ids = tokens(2, 12)
    gc.collect()
    gc.disable()
    try:
        labels = ids.where(torch.arange(12) > 6, -100)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        assert [workspace() is not None for workspace in made] == [True]
        if backward:
            loss.backward()
        del loss
        assert made[0]() is None
    finally:
        gc.enable()


def test_who_watches_an_edit_is_told_its_rows(tokens):
    model = build_adapter(build_model(), tied_weights=False).train()
    layer = model.base_model.model.model.layers[0]
    seen = {}
    for side in ("intv_0", "intv_1"):
        module = getattr(layer, side)["default"]
        module.on_edit = lambda before, after, side=side: seen.update(
            {side: (before.clone(), after.clone())}
        )
    step(model, tokens)
    for side, rows in (("intv_0", 4), ("intv_1", 6)):
        before, after = seen[side]
        assert before.shape == after.shape == (rows, HIDDEN)
        module = getattr(layer, side)["default"]
        module.on_edit = None
        assert_close(after, module(before), atol=1e-5, rtol=1e-4)
