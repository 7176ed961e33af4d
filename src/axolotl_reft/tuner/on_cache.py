"""Forwards on a filled cache, outside of the steps that ``generate`` prepares.

The record of a cache and the ids, labels and lengths of the forward tell its prompts:
the logits are those without a cache, or the forward is refused.

Shapes: B batch, T tokens of a forward, W columns seen so far (the cache's and T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers import Cache

from axolotl_reft.prompts.batch import real_tokens, sample_starts
from axolotl_reft.prompts.cached import Adapters, CacheRecord, Columns, Reading
from axolotl_reft.tuner.cached_edits import fitting_columns, record_of
from axolotl_reft.tuner.compat import cache_of
from axolotl_reft.tuner.context import FindSpans, ModelState

# Makes the record of the cache when the forward has ended.
MakeRecord = Callable[[], CacheRecord | None]

_ANEW = (
    "pass a fresh cache and the whole conversation; generate takes the whole "
    "conversation with the cache too, and computes anew what must be"
)


def read_on_cache(
    state: ModelState,
    inputs: Mapping[str, Any],
    tokens: Tensor,
    past: int,
    find_answers: Callable[[], Tensor] | None,
    checks_marks: bool,
    may_be_compiled: bool,
) -> tuple[FindSpans | None, MakeRecord | None]:
    """Find the prompts in a forward on a filled cache.

    Args:
        tokens: ids (B, T), or embeddings (B, T, D).
        past: columns in the cache.
        find_answers: returns the mask of the answers' tokens, where they are known.
        checks_marks: refuse marks that contradict them, and wait for the device.
        may_be_compiled: a compiled forward, which makes no record, may have filled it.

    Returns:
        The function that finds prompts, None where there are none; and the one that
        makes the cache's record, None where it has none.

    Raises:
        ValueError: the cached columns were edited for other prompts or adapters, or
            nothing tells whether several tokens go on with a prompt or answer it.
    """
    rows, width = tokens.shape[:2]
    cache, ids_BT = cache_of(inputs), inputs.get("input_ids")
    adapters = state.active_adapters(rows)
    turns = state.turns(adapters)
    record = None if is_compiling() else record_of(cache, past, rows)
    is_step = width == 1 and find_answers is None
    if record is None:
        keeps_records = isinstance(cache, Cache) and not may_be_compiled
        if adapters.names and (keeps_records or (turns and not is_step)):
            raise ValueError(
                "past_key_values: how the columns of this cache were edited is "
                f"unknown, since this model did not fill it; {_ANEW}"
            )
        return None, None
    last = record.readings[-1]
    is_step = is_step and past >= last.seen.width
    if is_step and ids_BT is not None and adapters == last.adapters:
        if not any(turn.generation_prompts for turn in turns):
            return None, partial(_decoded, record, past, ids_BT)
    mask_BW = inputs.get("attention_mask") if turns else None
    forward = _Forward(
        state, record, adapters, past, tokens, ids_BT, mask_BW, checks_marks
    )
    if find_answers is not None:
        return forward.checked(forward.read(find_answers()))
    if is_step or not turns:
        return forward.checked(forward.read())
    if forward.repeats(last.seen):
        return forward.checked(last.seen)
    return forward.checked_both_ways()


def new_record(
    state: ModelState,
    inputs: Mapping[str, Any],
    tokens: Tensor,
    find_answers: Callable[[], Tensor] | None,
) -> CacheRecord | None:
    """Return the record of a cache that a forward filled from its first column on; None
    where its mask does not tell tokens from padding."""
    if state.find_answers or (torch.is_grad_enabled() and state.layers[0].training):
        return None  # nobody goes on with a training step's
    shape, ids_BT = (tokens.shape[0], tokens.shape[1]), inputs.get("input_ids")
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
        return None
    answer_BT = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
    if find_answers is not None:
        answer_BT = find_answers().expand(shape).to(tokens.device) != 0
    ids_BT = None if ids_BT is None else ids_BT.clone()  # the caller's may be a buffer
    real_BT = real_tokens(mask, shape, tokens.device)
    seen = Columns(ids_BT, answer_BT, real_BT, find_answers is not None)
    starts_BT = sample_starts(inputs, shape)
    reading = Reading(0, seen, state.active_adapters(shape[0]))
    return CacheRecord([reading], shape[1], seen, starts_BT)


def _decoded(record: CacheRecord, past: int, ids_BT: Tensor) -> CacheRecord:
    record.decode(past, ids_BT.clone())
    return record


@dataclass(frozen=True)
class _Forward:
    """A forward of known tokens behind known columns."""

    state: ModelState
    record: CacheRecord
    adapters: Adapters
    past: int
    tokens: Tensor
    ids_BT: Tensor | None
    mask_BW: Any
    checks_marks: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[0], self.tokens.shape[1]

    def repeats(self, seen: Columns) -> bool:
        """Whether these are the next tokens of a prompt that was cut back."""
        ids_BT, stop = self.ids_BT, self.past + self.shape[1]
        if ids_BT is None or seen.ids_BW is None or stop > seen.width:
            return False
        return torch.equal(ids_BT, seen.ids_BW[:, self.past : stop])

    def read(self, answer_BT: Tensor | None = None, is_answer: bool = True) -> Columns:
        """Return the columns with these tokens, of answers or of a prompt."""
        shape, device = self.shape, self.tokens.device
        labelled = answer_BT is not None
        if answer_BT is None:
            answer_BT = torch.full(shape, is_answer, device=device)
        answer_BT = answer_BT.expand(shape).to(device) != 0
        ids_BT = None if self.ids_BT is None else self.ids_BT.clone()
        seen = self.record.columns.first(self.past).followed_by(
            Columns(ids_BT, answer_BT, torch.ones_like(answer_BT), labelled)
        )
        if self.mask_BW is None:
            return seen
        real_BW = real_tokens(self.mask_BW, (shape[0], seen.width), device)
        return replace(seen, real_BW=real_BW)

    def checked(self, seen: Columns) -> tuple[FindSpans, MakeRecord]:
        """Return what finds prompts in columns as they are seen; ValueError where the
        cached ones were edited for others."""
        keep = self._fitting(self.record, seen, self.past)
        if keep < self.past:
            raise ValueError(
                f"past_key_values: the cached columns from {keep} on were edited for "
                f"another prompt, adapter or strength; {_ANEW}"
            )
        return self._spans_in(seen), lambda: self._record(seen)

    def checked_both_ways(self) -> tuple[FindSpans | None, MakeRecord]:
        """Return what finds prompts whether the tokens answer or go on with a prompt;
        ValueError where that is not the same."""
        answered, asked = self.read(is_answer=True), self.read(is_answer=False)
        found = self.checked(answered)
        width = answered.width
        if self._fitting(self._record(answered), asked, width) < width:
            raise ValueError(
                f"past_key_values: {self.shape[1]} tokens on a filled cache, and "
                "nothing tells LoReFT whether they go on with the prompt or answer it; "
                "pass labels (-100 for tokens of the prompt), or call generate with "
                "the whole prompt and the cache"
            )
        return found[0], lambda: self._record(asked)

    def _fitting(self, record: CacheRecord, seen: Columns, columns: int) -> int:
        if not self.adapters.names:
            return columns  # the base's own business
        return fitting_columns(self.state, record, seen.spans, self.adapters, columns)

    def _record(self, seen: Columns) -> CacheRecord:
        computed = self.past + self.shape[1]
        return self.record.read_on(self.past, seen, self.adapters, computed)

    def _spans_in(self, seen: Columns) -> FindSpans:
        start, stop = self.past, self.past + self.shape[1]
        return lambda turns: seen.spans(turns, self.checks_marks).columns(start, stop)
