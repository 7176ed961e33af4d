"""The indices of edited tokens, found by a collator and handed to the forward."""

import pickle

import pytest
import torch
from conftest import build_adapter, build_model
from transformers import BatchEncoding

from axolotl_reft import LoreftConfig, PromptCounter
from axolotl_reft.training.frozen_prompt import use_frozen_prompt
from axolotl_reft.tuner import context
from axolotl_reft.tuner.context import POSITIONS
from axolotl_reft.tuner.frozen_prompt import FrozenPrompt
from axolotl_reft.tuner.model import hooks_of
from benchmarks.tasks import Operations

# Prompts and answers, each as long as it says, of the samples of two rows.
ROWS = [[(9, 3, 4, 2), (5, 6)], [(7, 2, 3, 1, 2, 2), (8, 4)]]


def batch(tokens, packed):
    """Rows of samples, or every sample in a row of its own, padded on the right."""
    samples = [sample for row in ROWS for sample in row]
    rows = ROWS if packed else [[sample] for sample in samples]
    width = 34
    ids = tokens(len(rows), width)
    labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for row, some in enumerate(rows):
        start = 0
        for sample in some:
            positions[row, start : start + sum(sample)] = torch.arange(sum(sample))
            mask[row, start : start + sum(sample)] = 1
            for number, length in enumerate(sample):
                if number % 2:
                    labels[row, start : start + length] = ids[
                        row, start : start + length
                    ]
                start += length
        positions[row, start:] = torch.arange(width - start)
    found = {"input_ids": ids, "labels": labels}
    return found | ({"position_ids": positions} if packed else {"attention_mask": mask})


def indices_of(model, adapter="default"):
    """What each forward of the model edits, by intervention, in their order."""
    found, state = [], model.base_model.model.loreft_hooks.state

    def note(*_):
        indices = state.context.indices(adapter)
        found.append([side.tolist() for side in indices.sides])

    model.base_model.model.model.layers[0].register_forward_hook(note)
    return found


def forward(model, inputs):
    """Loss, logits and gradients."""
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return [output.loss, output.logits, *gradients]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("turns", ["every", "first"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_tokens_are_edited_as_without_the_collator(
    tokens, packed, turns, tied
):
    """Conversations too, of which a row has more prompts than one."""
    model = build_adapter(
        build_model(), positions="f2+l3", turns=turns, tied_weights=tied
    )
    inputs, found = batch(tokens, packed), indices_of(model)
    expected = forward(model, inputs)
    given = PromptCounter.of(model, dict)(inputs)
    got = forward(model, given)
    assert found[0] == found[1]
    assert [i.tolist() for i in given[POSITIONS]["indices"]["default"]] == found[0]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_nothing_is_searched_for_when_the_collator_has_found_it(tokens, monkeypatch):
    """On an accelerator an operation is a launch, and counting makes the host wait."""
    model = build_adapter(build_model(), tied_weights=False)
    inputs = PromptCounter.of(model, dict)(batch(tokens, packed=False))
    counts, find = [], context.ForwardContext.indices

    def count(forward, adapter):
        with Operations() as operations:
            found = find(forward, adapter)
        counts.append(len(operations.names))
        return found

    monkeypatch.setattr(context.ForwardContext, "indices", count)
    model(**inputs)
    # One joins the two sides, for the first layer that asks.
    assert counts == [1, 0, 0]


def test_nothing_is_added_to_batches_without_labels_of_their_tokens(tokens):
    model = build_adapter(build_model())
    collate, inputs = PromptCounter.of(model, dict), batch(tokens, packed=True)
    assert POSITIONS in collate(inputs)
    assert POSITIONS not in collate({"input_ids": inputs["input_ids"]})
    assert POSITIONS not in collate(inputs | {"labels": torch.tensor([0, 1])})
    everywhere = build_adapter(build_model(), positions="all")
    assert POSITIONS not in PromptCounter.of(everywhere, dict)(inputs)


def test_the_collator_keeps_the_batch_and_can_go_to_another_process(tokens):
    model = build_adapter(build_model(), turns="first")
    inputs = batch(tokens, packed=True)
    collate = pickle.loads(pickle.dumps(PromptCounter.of(model, BatchEncoding)))
    got = collate(inputs)
    assert {key: got[key] for key in inputs} == inputs
    assert got[POSITIONS]["shape"] == tuple(inputs["input_ids"].shape)


def test_each_adapter_has_indices_of_its_own(tokens):
    model = build_adapter(build_model(), positions="f2")
    model.add_adapter("other", LoreftConfig(positions="l1", turns="first"))
    model.base_model.set_adapter(["default", "other"])
    inputs = batch(tokens, packed=False)
    first, second = indices_of(model), indices_of(model, "other")
    forward(model, inputs)
    given = PromptCounter.of(model, dict)(inputs)
    forward(model, given)
    assert first[0] == first[1] and second[0] == second[1] != first[0]


@pytest.mark.usefixtures("one_thread")
def test_rows_that_were_cut_out_of_the_batch_are_searched_anew(tokens):
    """By a trainer that splits what its collator made."""
    model = build_adapter(build_model())
    inputs = batch(tokens, packed=False)
    given = PromptCounter.of(model, dict)(inputs)
    half = {key: value[2:] for key, value in inputs.items()}
    expected = forward(model, half)
    got = forward(model, half | {POSITIONS: given[POSITIONS]})
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_adapters_by_row_are_searched_anew(tokens):
    model = build_adapter(build_model())
    inputs = batch(tokens, packed=False)
    given = PromptCounter.of(model, dict)(inputs)
    names = ["default", "__base__"] * (len(inputs["labels"]) // 2)
    expected = model(**inputs, adapter_names=names).logits
    assert torch.equal(model(**given, adapter_names=names).logits, expected)


@torch.no_grad()
def test_indices_are_of_one_forward(tokens):
    model = build_adapter(build_model())
    inputs, given = batch(tokens, packed=False), []
    backbone = model.base_model.model.model
    backbone.register_forward_pre_hook(
        lambda module, args, kwargs: given.extend(kwargs), with_kwargs=True
    )
    model(**PromptCounter.of(model, dict)(inputs))
    assert "input_ids" in given and POSITIONS not in given
    assert model.base_model.model.loreft_hooks.state.thread.given is None


def test_a_compiled_model_takes_them(tokens):
    torch._dynamo.reset()
    model = build_adapter(build_model(), tied_weights=False).train()
    collate = PromptCounter.of(model, dict)
    batches = [batch(tokens, packed=True) for _ in range(3)]
    for number, inputs in enumerate(batches):  # other prompts, of other numbers
        inputs["labels"][:, 20 : 20 + 2 * number] = -100
    expected = [forward(model, inputs) for inputs in batches]
    model.compile(backend="aot_eager", fullgraph=True)
    for inputs, values in zip(batches, expected, strict=True):
        for one, other in zip(forward(model, collate(inputs)), values, strict=True):
            assert torch.allclose(one, other, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("turns", ["every", "first"])
def test_where_counting_must_be_avoided_slots_are_reserved(
    tokens, monkeypatch, packed, turns
):
    """As in a graph, for every token, or for a prompt of each row."""
    model = build_adapter(build_model(), positions="f2+l3", turns=turns)
    inputs, found = batch(tokens, packed), indices_of(model)
    expected = forward(model, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        got = forward(model, inputs)
    rows, width = inputs["labels"].shape
    one_prompt_rows = turns == "first" and not packed
    assert len(found[1][0]) == (rows * 5 if one_prompt_rows else rows * width)
    assert torch.equal(got[1], expected[1])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("turns", ["every", "first"])
def test_an_answer_that_no_mark_announces_stops_its_batch(tokens, turns):
    """Not the first turn's prompt, which later answers do not move."""
    markers = {"generation_prompts": [[5]], "end_of_turn": [2]}
    model = build_adapter(build_model(), turns=turns, turn_markers=markers)
    ids = torch.tensor([[7, 8, 5, 9, 2, 10, 11, 12, 13, 2, 7, 5, 9, 2]])
    labels = torch.full_like(ids, -100)
    labels[0, [3, 4, 7, 8, 9, 12, 13]] = 1
    collate = PromptCounter.of(model, dict)
    if turns == "every":
        with pytest.raises(ValueError, match="turn_markers: the labels train tokens"):
            collate(input_ids=ids, labels=labels)
    else:
        assert collate(input_ids=ids, labels=labels)[POSITIONS]["indices"]["default"]


@pytest.mark.parametrize("packed", [True, False])
def test_a_forward_in_two_parts_reads_the_batch_as_the_collator_made_it(
    tokens, packed, monkeypatch
):
    """So that an accelerator need not be waited for."""
    model = build_adapter(build_model(), positions="l3").train()
    inputs = batch(tokens, packed)
    loss, _, *gradients = forward(model, inputs)
    use_frozen_prompt(model, True)
    with_indices = PromptCounter.of(model, dict)(inputs)
    moved = {
        name: tensor.to("meta") if name == "attention_mask" else tensor
        for name, tensor in with_indices.items()
    }
    monkeypatch.setattr(context, "edit_indices", None)
    # It compares with the whole, which needs the mask.
    monkeypatch.setattr(FrozenPrompt, "_check_base", lambda *_: "")
    got_loss, _, *got = forward(model, moved)  # logits at padding differ
    torch.testing.assert_close([got_loss, *got], [loss, *gradients])
    hooks = hooks_of(model.get_base_model())
    assert len(hooks.frozen_prompt.kept) == 4
