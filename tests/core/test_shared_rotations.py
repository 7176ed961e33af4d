"""One computation of all layers' rotations is the same as one for each."""

import pytest
import torch
from conftest import LAYERS, build_adapter, build_model
from torch.testing import assert_close

from axolotl_reft import LoreftConfig
from axolotl_reft.core import shared_rotations
from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.core.shared_rotations import lent
from axolotl_reft.tuner import prompts


@pytest.fixture
def without(monkeypatch):
    return lambda: monkeypatch.setattr(prompts, "shared_rotations", lambda some: {})


def build(name="loreft", size=12, rank=3):
    one = INTERVENTION_CLASSES[name](embed_dim=size, low_rank_dimension=rank)
    if hasattr(one, "rotation"):
        torch.nn.init.normal_(one.rotation)
    return one


def step(model, tokens):
    """The loss and all gradients of a training step."""
    ids = tokens(2, 12)
    model.zero_grad()
    labels = ids.where(torch.arange(12) > 6, -100)
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.requires_grad)]


def test_matrices_and_gradients_are_those_of_each(computed):
    some = [build(), build(rank=2), build("lobireft"), build("noreft"), build(size=8)]
    found = shared_rotations.shared_rotations(some)
    assert sorted(computed) == [1, 1, 2]
    assert set(found) == {one for one in some if hasattr(one, "rotation")}
    for one, rows_RD in found.items():
        weights = torch.randn_like(rows_RD)
        own = one.rotation_matrix().T
        assert_close(rows_RD, own)
        got = torch.autograd.grad(rows_RD, one.rotation, weights, retain_graph=True)
        assert_close(got, torch.autograd.grad(own, one.rotation, weights))


def test_a_gradient_is_laid_out_as_its_parameter():
    """Else autograd would copy each of them."""
    some = [build(), build()]
    found = shared_rotations.shared_rotations(some)
    total = sum(rows_RD.square().sum() for rows_RD in found.values())
    for gradient in torch.autograd.grad(total, [one.rotation for one in some]):
        assert gradient.is_contiguous()


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
        ({"component": "mlp_output"}, []),
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
    assert computed == [LAYERS, 2 * LAYERS, LAYERS]


def test_beside_edits_within_checkpointed_layers(computed, tokens):
    """Made within a layer, they would not be there when that is replayed."""
    model = build_adapter(build_model(), component="mlp_output").train()
    model.add_adapter("outer", LoreftConfig(positions="l1"))
    model.base_model.set_adapter(["default", "outer"])
    expected = step(model.train(), tokens)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(step(model, tokens), expected)
    assert computed == [LAYERS, LAYERS]


def test_without_gradients_each_keeps_its_own(computed, tokens):
    model = build_adapter(build_model()).eval()
    with torch.no_grad():
        model(input_ids=tokens(1, 8))
    assert computed == []
    wrapper = model.base_model.model.model.layers[0]
    assert wrapper.intv_0["default"]._kept is not None


def test_one_that_a_hook_watches_makes_its_own(computed, tokens):
    model = build_adapter(build_model(), tied_weights=False).train()
    expected = step(model, tokens)
    layers = model.base_model.model.model.layers
    layers[0].intv_0["default"].register_forward_hook(lambda *_: None)
    layers[1].intv_1["default"].register_forward_pre_hook(lambda *_: None)
    layers[2].intv_1["default"]._hf_hook = object()
    assert_close(step(model, tokens), expected)
    assert computed == [2 * LAYERS, 2 * LAYERS - 3]


def test_what_was_lent_is_given_back():
    one = build()
    with lent([one], {one: torch.ones(3, 12)}):
        assert torch.equal(one.rotation_matrix(), torch.ones(12, 3))
        assert torch.equal(one.matrix_RD(), torch.ones(3, 12))
    with pytest.raises(RuntimeError), lent([one], {one: torch.ones(3, 12)}):
        raise RuntimeError
    assert one.lent_RD is None
    with lent([one], {}):
        assert_close(one.matrix_RD(), one.rotation_matrix().T)
