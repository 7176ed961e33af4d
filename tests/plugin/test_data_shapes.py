"""Batches as axolotl's own collators make them: every sample as it is alone."""

import pytest
import torch
from axolotl.utils.collators import (
    BatchSamplerDataCollatorForSeq2Seq,
    DataCollatorForSeq2Seq,
    V2BatchSamplerDataCollatorForSeq2Seq,
)
from axolotl.utils.trainer import add_pose_position_ids, add_position_ids
from conftest import build_adapter, build_model
from transformers import DataCollatorWithFlattening
from workspace import build_tokenizer

# Prompt and answer of each sample; two bins of them, as the multipack sampler makes.
BINS = [[(9, 3), (4, 5)], [(1, 6), (7, 2), (6, 1)]]
WIDTH = 32


def sample(tokens, prompt, answer, seed):
    ids = tokens(1, prompt + answer, seed)[0].tolist()
    labels = [-100] * prompt + ids[prompt:]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


@pytest.fixture
def bins(tokens):
    return [
        [sample(tokens, *sizes, seed=10 * row + i) for i, sizes in enumerate(sizes_)]
        for row, sizes_ in enumerate(BINS)
    ]


def pack(collator, bins, mask, side="right"):
    tokenizer = build_tokenizer()
    tokenizer.padding_side = side
    collate = collator(tokenizer, pad_to_multiple_of=WIDTH)
    rows = [[add_position_ids(dict(one)) for one in row] for row in bins]
    for one in (one for row in rows for one in row):
        if not mask:  # as axolotl does where attention goes by the positions
            del one["attention_mask"]
    batch = collate(rows)
    assert batch["input_ids"].shape == (len(bins), WIDTH)
    assert ("attention_mask" in batch) == mask
    return dict(batch)


def places(bins, side="right"):
    """Where each sample stands: its row and its columns."""
    for row, samples in enumerate(bins):
        lengths = [len(one["input_ids"]) for one in samples]
        start = 0 if side == "right" else WIDTH - sum(lengths)
        for one, length in zip(samples, lengths, strict=True):
            yield one, row, slice(start, start + length)
            start += length


def alone(one):
    return {key: torch.tensor([one[key]]) for key in ("input_ids", "labels")}


def edited(model, batch):
    """Rows and columns of what the first layer edits in a forward of this batch."""
    found, state = [], model.get_base_model().loreft_hooks.state

    def listen(*_):
        found.append(state.context.indices("default").all_N.sort().values.tolist())

    handle = model.get_base_model().model.layers[0].register_forward_hook(listen)
    with torch.no_grad():
        model(**batch, use_cache=False)
    handle.remove()
    return found[0]


COLLATORS = [V2BatchSamplerDataCollatorForSeq2Seq, BatchSamplerDataCollatorForSeq2Seq]


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_rows_train_as_their_samples_do(bins, collator, attention, side):
    base = build_model()
    base.set_attn_implementation(attention)
    model = build_adapter(base, tied_weights=False).train()
    batch = pack(collator, bins, mask=False, side=side)
    parameters = [p for p in model.parameters() if p.requires_grad]
    output = model(**batch, use_cache=False)
    trained = (batch["labels"] != -100).sum()
    (output.loss * trained).backward()
    got = [p.grad.clone() for p in parameters]
    model.zero_grad()
    total = 0
    for one, row, columns in places(bins, side):
        single = model(**alone(one))
        assert torch.allclose(output.logits[row, columns], single.logits[0], atol=2e-5)
        total = total + single.loss * (alone(one)["labels"] != -100).sum()
    total.backward()
    assert torch.allclose(output.loss * trained, total, atol=1e-4)
    for one, parameter in zip(got, parameters, strict=True):
        assert torch.allclose(one, parameter.grad, atol=1e-4)


def expected_edits(bins, first=2, last=3, side="right"):
    """Flat indices of what f2+l3 edits, counted sample by sample."""
    indices = []
    for one, row, columns in places(bins, side):
        prompt = one["labels"].count(-100)
        start, half = row * WIDTH + columns.start, prompt // 2
        indices += range(start, start + min(first, half))
        indices += range(start + prompt - min(last, half), start + prompt)
    return sorted(indices)


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_packed_rows_is_not_edited(bins, collator, mask, side):
    """Without a mask it looks like a sample of its own; with one of segment numbers
    (another attention than those that go by the positions) it is told by that."""
    batch = pack(collator, bins, mask, side)
    model = build_adapter(build_model(), tied_weights=True)
    assert edited(model, batch) == expected_edits(bins, side=side)


def test_samples_without_a_prompt_or_an_answer_in_packed_rows(tokens):
    """Every token trained, or none (its answer was cut off): neither is edited."""
    samples = [sample(tokens, *sizes, seed=3) for sizes in ((0, 6), (5, 0), (6, 4))]
    batch = pack(COLLATORS[0], [samples], mask=False)
    got = edited(build_adapter(build_model()), batch)
    assert got == [11, 12, 14, 15, 16]


def test_flattened_batches_train_as_their_samples_do(bins):
    model = build_adapter(build_model())
    samples = [one for row in bins for one in row if one["labels"][0] == -100]
    rows = [{key: one[key] for key in ("input_ids", "labels")} for one in samples]
    batch = DataCollatorWithFlattening(return_tensors="pt")(rows)
    assert batch["input_ids"].shape[0] == 1
    logits = model(**batch, use_cache=False).logits[0]
    lengths = [len(one["input_ids"]) for one in samples]
    for one, got in zip(samples, logits.split(lengths), strict=True):
        assert torch.allclose(got, model(**alone(one)).logits[0], atol=2e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pose", [True, False])
def test_rows_of_one_sample_train_as_they_do_alone(bins, side, pose):
    """Padded to a multiple; with PoSE, whose positions skip, as well."""
    tokenizer = build_tokenizer()
    tokenizer.padding_side = side
    samples = [dict(one) for one in bins[1][1:]]
    if pose:
        samples = [add_pose_position_ids(one, max_context_len=60) for one in samples]
    rows = [
        {key: list(one[key]) for key in one if key not in ("length", "sequence_len")}
        for one in samples
    ]
    for one in rows:
        if "position_ids" in one:
            one["position_ids"] = [int(place) for place in one["position_ids"]]
    batch = dict(DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=WIDTH)(rows))
    model = build_adapter(build_model())
    got = edited(model, batch)
    where = [[one] for one in bins[1][1:]]
    assert got == expected_edits(where, side=side)
