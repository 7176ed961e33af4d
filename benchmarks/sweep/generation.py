"""The checks of generation, with a cache and without.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.sweep.findings import Finding, by_itself, compared, relative
from benchmarks.sweep.subject import Subject, columns

_NEW = 4
# The ids of the whole, and the logits (B, T, vocabulary) of the steps.
Steps = tuple[Tensor, Tensor]


def caches(subject: Subject) -> Iterator[Finding]:
    """Greedy generation with a cache and without gives the reference's logits."""
    if not subject.generates:
        return
    row = subject.batch(subject.ids(1, subject.length, seed=3))
    prompts = {"generate": (row, columns((0, subject.length)))}
    if subject.takes_mask:
        both = subject.padded(True, (subject.length, subject.shorter))
        at = columns(
            (0, subject.length), (subject.length - subject.shorter, subject.length)
        )
        prompts["generate, left padding"] = (both, at)
    for name, (batch, where) in prompts.items():
        found = {}
        for use_cache in (False, True):
            with by_itself():
                model = subject.reference.edit(where, subject.length)
                expected = greedy(model, batch, use_cache)
                plain = greedy(subject.base, batch, use_cache)
            got = greedy(subject.adapter, batch, use_cache)
            if subject.base.config.model_type == "xlnet":
                # Later steps pass prompt tokens again: tests/tuner/test_caches.py.
                got, plain, expected = map(_first_step, (got, plain, expected))
            found[use_cache] = got, plain, expected
            suffix = "" if use_cache else ", no cache"
            yield compared(name + suffix, _agreement(got, expected))
        differences = map(_agreement, found[True], found[False])
        yield compared(f"{name}, cached or not", *differences)


def greedy(model: Any, batch: dict[str, Tensor], use_cache: bool) -> Steps:
    """Return the ids and the logits (B, T, vocabulary) of the steps."""
    with torch.no_grad():
        result = model.generate(
            **batch,
            max_new_tokens=_NEW,
            min_new_tokens=_NEW,
            do_sample=False,
            num_beams=1,
            use_cache=use_cache,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return result.sequences, torch.stack(result.logits, 1)


def _first_step(steps: Steps) -> Steps:
    return steps[0][:, : 1 - _NEW], steps[1][:, :1]


def _agreement(got: Steps, expected: Steps) -> float:
    """Compare logits up to the first step whose history differs."""
    if got[1].shape != expected[1].shape:
        return float("inf")
    steps = got[1].shape[1]
    same = (got[0][:, -steps:] == expected[0][:, -steps:]).all(0).long().cumprod(0)
    steps = min(int(same.sum()) + 1, steps)
    return relative(got[1][:, :steps], expected[1][:, :steps])
