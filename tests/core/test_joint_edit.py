"""One edit of prefix and suffix together is the same as one of each."""

import pytest
import torch
from conftest import build_adapter, build_model
from torch.testing import assert_close

from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.core.joint_edit import can_join, joint_edit
from axolotl_reft.tuner import layer


def build(name="loreft", size=12, rank=3, **settings):
    one = INTERVENTION_CLASSES[name](
        embed_dim=size, low_rank_dimension=rank, **settings
    )
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)
    return one


def step(edit, h_ND, interventions, weights_ND):
    """What comes out, and all gradients."""
    h_ND = h_ND.clone().requires_grad_()
    edited_ND = edit(h_ND)
    trained = [p for one in interventions for p in one.parameters()]
    asked = [h_ND, *trained]
    return [edited_ND, *torch.autograd.grad(edited_ND, asked, weights_ND)]


@pytest.mark.parametrize("prefixes", [0, 2, 5])
@pytest.mark.parametrize("name", INTERVENTION_CLASSES)
def test_values_and_gradients_are_those_of_each(name, prefixes):
    some = [build(name), build(name)]
    h_ND, weights_ND = torch.randn(2, 5, 12)

    def apart(h_ND):
        sides = h_ND[:prefixes], h_ND[prefixes:]
        return torch.cat([one(h) for one, h in zip(some, sides, strict=True)])

    got = step(lambda h_ND: joint_edit(some, prefixes, h_ND), h_ND, some, weights_ND)
    expected = step(apart, h_ND, some, weights_ND)
    assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_it_is_computed_in_float32():
    some = [build(), build()]
    h_ND = torch.randn(5, 12).bfloat16()
    expected = torch.cat([some[0](h_ND[:2]), some[1](h_ND[2:])])
    with torch.autocast("cpu", torch.bfloat16):
        edited_ND = joint_edit(some, 2, h_ND)
    assert edited_ND.dtype == torch.bfloat16
    assert torch.equal(edited_ND, expected)


def watch(one):
    one.register_forward_hook(lambda *_: None)


def log(one):
    one.on_edit = lambda before, after: None


@pytest.mark.parametrize("by", [watch, log])
def test_what_is_told_of_edits_is_told_of_each(by):
    some = [build(), build()]
    assert can_join(some)
    by(some[1])
    assert not can_join(some)


def test_which_sides_have_nothing_in_common():
    assert not can_join([build()])
    assert not can_join([build(act_fn="gelu"), build(act_fn="gelu")])
    dropping = [build(dropout=0.1), build(dropout=0.1)]
    assert not can_join(dropping)
    assert can_join([one.eval() for one in dropping])


def test_without_a_graph_each_side_has_products_of_its_own(tokens, monkeypatch):
    """They are half as long, and there is nothing to fuse what joins them with."""
    model = build_adapter(build_model(), tied_weights=False)
    joined = []
    monkeypatch.setattr(layer, "joint_edit", lambda *_: joined.append(1))
    model(input_ids=tokens(2, 12), use_cache=False)
    assert not joined
