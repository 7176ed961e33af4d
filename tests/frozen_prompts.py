"""Forwards in two parts beside the plain forward of the same model.

Shapes: B batch, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import torch
from conftest import VOCABULARY

from axolotl_reft.training.frozen_prompt import use_frozen_prompt
from axolotl_reft.tuner.compat import cache_of
from axolotl_reft.tuner.model import hooks_of
from axolotl_reft.tuner.preamble_cache import PreambleCache

# Float32 rounding, of the largest number.
TOLERANCE = 3e-5
CACHE = "100MB"


def ragged(lengths, prompts, left=False, width=None, seed=0, **more):
    """A padded batch of samples of so many tokens with so long prompts."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        begin = width - length if left else 0
        mask[row, begin : begin + length] = 1
        answer = slice(begin + prompt, begin + length)
        labels[row, answer] = ids[row, answer]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels, **more}


def packed(*rows, width=None, seed=0):
    """Rows of samples, each of so many tokens with so long a prompt, side by side; the
    padded end of a row counts from 0, as axolotl's."""
    width = width or max(sum(length for length, _ in row) for row in rows)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(rows), width), generator=generator)
    labels, positions = ids.clone(), torch.zeros_like(ids)
    for row, samples in enumerate(rows):
        rest = width - sum(length for length, _ in samples)
        column = 0
        for length, prompt in [*samples, (rest, rest)]:
            labels[row, column : column + prompt] = -100
            positions[row, column : column + length] = torch.arange(length)
            column += length
        ids[row, width - rest :] = 0
    named = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return named | {"use_cache": False}


def results(model, batch, seed=0):
    """The loss, the logits of the samples' tokens, and all gradients."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(**batch)
    output.loss.backward()
    real = batch.get("attention_mask", batch.get("input_ids")) != 0
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    loss, logits = output.loss.detach(), output.logits.detach()
    return SimpleNamespace(loss=loss, logits=logits[real], gradients=gradients)


def difference(got, expected):
    """The largest, of the largest number there is."""
    assert got.gradients.keys() == expected.gradients.keys()
    assert any(g.any() for g in expected.gradients.values())
    largest = max(g.abs().max() for g in expected.gradients.values())
    worst = [
        (got.loss - expected.loss).abs() / expected.loss.abs(),
        (got.logits - expected.logits).abs().max() / expected.logits.abs().max(),
    ]
    for name, gradient in expected.gradients.items():
        worst.append((got.gradients[name] - gradient).abs().max() / largest)
    return max(float(each) for each in worst)


@contextmanager
def two_parts(model, when=True, cache=CACHE, checks=False) -> Iterator[SimpleNamespace]:
    """The model computes in two parts, and ``checks`` its base first; yields what was
    told, and the ``numbers`` of tokens of all calls of the backbone's forward, each
    with whether it is one of two parts."""
    told, numbers = [], []
    use_frozen_prompt(model, when, cache, told.append)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    frozen = hooks_of(base).frozen_prompt
    if frozen is not None:
        plain = frozen._forward

        def note(*args, **inputs):
            numbers.append(_tokens(args, inputs))
            return plain(*args, **inputs)

        frozen._forward = note
        if not checks:
            frozen._checked |= set(product([True, False], repeat=2))
        if not frozen.reason:
            noted = replace(frozen._partial_forward, forward=note)
            frozen._partial_forward = noted
    try:
        yield SimpleNamespace(told=told, frozen=frozen, numbers=numbers)
    finally:
        use_frozen_prompt(model, False)


def _tokens(args, inputs):
    """The tokens of a backbone's forward, and whether it is one of two parts."""
    ids = inputs.get("input_ids", args[0] if args else None)
    tokens = ids if ids is not None else inputs["inputs_embeds"][..., 0]
    return tokens.numel(), isinstance(cache_of(inputs), PreambleCache)


def assert_same_in_two_parts(model, *batches, tolerance=TOLERANCE, **settings):
    """Twice: the second time the preambles are kept."""
    for batch in batches:
        expected = results(model, batch)
        with two_parts(model, **settings) as seen:
            got = results(model, batch)
            assert seen.numbers, seen.told
            assert all(parts for _, parts in seen.numbers), seen.told
            assert len(seen.numbers) > 1
            assert difference(got, expected) < tolerance
            first = len(seen.numbers)
            again = results(model, batch)
            assert difference(again, expected) < tolerance
            if settings.get("cache", CACHE) != 0:
                assert len(seen.numbers) == first + 1, "all is kept"
