"""What was kept is forgotten where the base, or how it computes, is another."""

import pytest
import torch
from conftest import build_adapter, build_model
from frozen_prompts import TOLERANCE, difference, ragged, results, two_parts
from torch import nn

BATCH = ragged([20, 17], [14, 10])


@pytest.fixture
def model():
    return build_adapter(build_model(), positions="l3").train()


def projection(model):
    return model.get_base_model().model.layers[0].base_layer.self_attn.q_proj


def replaced(model):
    weight = projection(model).weight.detach() * 1.5
    projection(model).weight = nn.Parameter(weight, requires_grad=False)


def in_place(model):
    with torch.no_grad():
        projection(model).weight.mul_(1.5)


def data_replaced(model):
    projection(model).weight.data = projection(model).weight.data * 1.5


def one_embedding(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[BATCH["input_ids"][0, 3]].mul_(2)


def rounded(model):
    model.get_base_model().half().float()


def loaded(model):
    states = model.get_base_model().state_dict()
    states = {n: t * 1.2 for n, t in states.items() if "intv" not in n}
    model.get_base_model().load_state_dict(states, strict=False)


def module_replaced(model):
    old = projection(model)
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    model.get_base_model().model.layers[0].base_layer.self_attn.q_proj = new
    new.requires_grad_(False)


def frequencies(model):
    model.get_base_model().model.rotary_emb.inv_freq.mul_(1.5)


CHANGES = (
    replaced,
    in_place,
    data_replaced,
    one_embedding,
    rounded,
    loaded,
    module_replaced,
    frequencies,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_after_a_change_of_the_base_nothing_is_stale(model, change):
    with two_parts(model) as seen:
        results(model, BATCH)
        del seen.numbers[:]
        before = results(model, BATCH)
        assert len(seen.numbers) == 1
        change(model)
        got = results(model, BATCH)
    expected = results(model, BATCH)
    assert difference(got, expected) < TOLERANCE
    assert difference(before, expected) > TOLERANCE


def test_with_autocast_and_without_it_differs(model):
    with two_parts(model) as seen:
        for enabled in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                del seen.numbers[:]
                first = results(model, BATCH)
                assert len(seen.numbers) > 1, "what was kept is of another dtype"
                del seen.numbers[:]
                again = results(model, BATCH)
                assert len(seen.numbers) == 1
                assert difference(again, first) < (0.05 if enabled else TOLERANCE)


def test_steps_of_the_adapter_forget_nothing(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with two_parts(model) as seen:
        results(model, BATCH)
        for _ in range(2):
            optimizer.step()
            del seen.numbers[:]
            results(model, BATCH)
            assert len(seen.numbers) == 1


def test_nobody_is_given_what_is_kept(model):
    """Keys, values and hidden states of a forward may be written to."""
    given = []

    def overwrite(module, args, output):
        given.append(output[0])

    backbone = model.get_base_model().model
    with two_parts(model) as seen, torch.no_grad():
        model.eval()
        batch = BATCH | {"use_cache": False}
        expected = model(**batch).logits.clone()
        edges = [edge.states for edge in seen.frozen.kept._edges]
        handle = backbone.register_forward_hook(overwrite)
        model(**batch)
        handle.remove()
        given[0].fill_(7)
        kept = {
            t.untyped_storage().data_ptr() for s in edges for t in (*s.keys, *s.values)
        }
        assert given[0].untyped_storage().data_ptr() not in kept
        real = BATCH["attention_mask"] != 0
        again = model(**batch).logits
        assert (again[real] - expected[real]).abs().max() < TOLERANCE * 10
