"""The number of prompts, counted by a collator and told to the model's forward."""

import pickle

import pytest
import torch
from conftest import build_adapter, build_model
from transformers import BatchEncoding

from axolotl_reft import PromptCounter
from axolotl_reft.prompts.turns import Turns
from axolotl_reft.training.prompt_counts import count_prompts
from axolotl_reft.tuner import prompts
from axolotl_reft.tuner.prompts import PROMPTS, _Batch, _slots
from benchmarks.tasks import Operations

EVERY, FIRST = Turns(every=True), Turns(every=False)
# Prompts and answers, each as long as it says, of the samples of two rows.
ROWS = [[(9, 3, 4, 2), (5, 6)], [(7, 2, 3, 1, 2, 2), (8, 4)]]
PACKED_PROMPTS = {EVERY: 2 + 1 + 3 + 1, FIRST: 4}


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


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("turns", [EVERY, FIRST])
def test_the_next_power_of_two_is_counted(tokens, packed, turns):
    expected = {7: 8, 4: 4}[PACKED_PROMPTS[turns]]
    assert count_prompts(batch(tokens, packed), frozenset([turns])) == expected
    both = count_prompts(batch(tokens, packed), frozenset([EVERY, FIRST]))
    assert both == 8


def test_nothing_is_told_of_other_batches(tokens):
    some = batch(tokens, packed=True)
    turns = frozenset([EVERY])
    assert count_prompts({"input_ids": some["input_ids"]}, turns) is None
    assert count_prompts(some | {"labels": torch.tensor([0, 1])}, turns) is None
    assert count_prompts(some, frozenset()) is None


def test_the_collator_adds_the_number_and_can_go_to_another_process(tokens):
    model = build_adapter(build_model(), turns="first")
    some = batch(tokens, packed=True)
    counter = pickle.loads(pickle.dumps(PromptCounter.of(model, BatchEncoding)))
    got = counter(some)
    assert got[PROMPTS] == 4
    assert {key: got[key] for key in some} == some


# What is patched to have a CPU reserve slots as others do.
RESERVES = {
    "compiled": (torch.compiler, "is_compiling", lambda: True),
    "accelerator": (prompts, "_counting_is_free", lambda device: False),
}


def forward(model, inputs, monkeypatch, reserves=None):
    """Loss, logits, gradients, and how many slots were reserved for each side."""
    shapes = []
    tracker = model.base_model.model.loreft_tracker
    ask = tracker.indices

    def listen(*args):
        found = ask(*args)
        shapes.append([len(index) for index in found])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(tracker, "indices", listen)
        if reserves:
            patch.setattr(*RESERVES[reserves])
        output = model(**inputs, use_cache=False)
        output.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return output, gradients, shapes[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("turns", ["every", "first"])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("where", list(RESERVES))
@pytest.mark.parametrize("tied", [True, False])
def test_slots_for_what_was_counted_compute_the_same(
    tokens, monkeypatch, packed, turns, told, where, tied
):
    """Conversations too, of which a row has more prompts than one."""
    model = build_adapter(
        build_model(), positions="f2+l3", turns=turns, tied_weights=tied
    )
    inputs = batch(tokens, packed)
    expected, gradients, counted = forward(model, inputs, monkeypatch)
    if told:
        inputs = PromptCounter.of(model, dict)(inputs)
    output, got, slots = forward(model, inputs, monkeypatch, where)
    assert torch.equal(output.logits, expected.logits)
    for one, other in zip(got, gradients, strict=True):
        torch.testing.assert_close(one, other)
    rows, width = inputs["input_ids"].shape
    sides = [5] if tied else [2, 3]
    if told or (turns == "first" and not packed):
        most = {"every": 8, "first": 4}[turns] if told else rows
        assert slots == [most * side for side in sides]
    elif where == "compiled":
        assert slots == [rows * width] * len(sides)
    else:
        assert slots == counted


@pytest.mark.usefixtures("one_thread")
def test_an_accelerator_edits_what_is_left_of_a_prompt_with_a_hole(tokens, monkeypatch):
    """Of the first turns alone, a prompt is what is real before the answer."""
    model = build_adapter(build_model(), turns="first")
    inputs = batch(tokens, packed=False)
    inputs["attention_mask"][:, 3] = 0
    expected, *_ = forward(model, inputs, monkeypatch)
    inputs = PromptCounter.of(model, dict)(inputs)
    output, _, slots = forward(model, inputs, monkeypatch, "accelerator")
    assert torch.equal(output.logits, expected.logits)
    assert slots == [4 * 5]


@pytest.mark.usefixtures("one_thread")
def test_an_accelerator_edits_the_rows_of_an_adapter_alone(tokens, monkeypatch):
    model = build_adapter(build_model())
    inputs = batch(tokens, packed=False)
    inputs["adapter_names"] = ["default", "__base__"] * (len(inputs["labels"]) // 2)
    expected, *_ = forward(model, inputs, monkeypatch)
    output, _, slots = forward(model, inputs | {PROMPTS: 8}, monkeypatch, "accelerator")
    assert torch.equal(output.logits, expected.logits)
    assert slots == [8 * 5]


@pytest.mark.parametrize("where", list(RESERVES))
def test_no_more_slots_are_reserved_than_there_are_tokens(tokens, monkeypatch, where):
    model = build_adapter(build_model(), tied_weights=False)
    inputs = batch(tokens, packed=True) | {PROMPTS: 4096}
    _, _, slots = forward(model, inputs, monkeypatch, where)
    assert slots == [inputs["labels"].numel()] * 2


def test_an_accelerator_is_asked_for_twenty_operations(tokens, monkeypatch):
    """Each is a launch that the first edited layer waits for; from masks, 35."""
    model = build_adapter(build_model(), tied_weights=False)
    inputs = PromptCounter.of(model, dict)(batch(tokens, packed=False))
    tracker = model.base_model.model.loreft_tracker
    counts = []
    ask = tracker.indices

    def count(*args):
        with Operations() as operations:
            found = ask(*args)
        counts.append(len(operations.names))
        return found

    monkeypatch.setattr(tracker, "indices", count)
    monkeypatch.setattr(*RESERVES["accelerator"])
    model(**inputs)  # the first batch is checked for prompts
    counts.clear()
    model(**inputs)
    assert counts[0] == 20


@pytest.mark.parametrize("where", list(RESERVES))
def test_too_small_a_number_loses_no_edit_silently(tokens, monkeypatch, where):
    model = build_adapter(build_model(), tied_weights=False)
    inputs = batch(tokens, packed=True) | {PROMPTS: 2}
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        forward(model, inputs, monkeypatch, where)


def test_a_number_is_of_one_forward(tokens):
    model = build_adapter(build_model())
    inputs = batch(tokens, packed=False)
    given = []
    backbone = model.base_model.model.model
    backbone.register_forward_pre_hook(
        lambda module, args, kwargs: given.extend(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(model(**inputs, **{PROMPTS: 8}).logits, expected)
    assert "input_ids" in given and PROMPTS not in given
    assert model.base_model.model.loreft_tracker._now.told_prompts is None


@pytest.mark.parametrize(
    ("most", "turns", "one_sample_rows", "expected"),
    [
        (16, EVERY, False, 16 * 7),
        (16, FIRST, True, 16 * 7),
        (1 << 20, EVERY, False, 2 * 100),
        (None, FIRST, True, 2 * 7),
        (None, FIRST, False, None),
        (None, EVERY, True, None),
    ],
)
def test_on_an_accelerator_the_host_waits_only_where_nothing_else_tells(
    most, turns, one_sample_rows, expected
):
    found = _Batch((2, 100), lambda turns: None, one_sample_rows, most=most)
    assert _slots(found, turns, 2, 7, "cuda") == expected
    assert _slots(found, turns, 2, 7, "cpu") is None
