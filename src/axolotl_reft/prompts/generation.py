"""The prompt that ``generate`` was given, and its step under way.

Shapes: B batch, P columns handed to ``generate``, T tokens of this forward, W columns
seen so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_reft.prompts.cached import Adapters, CacheRecord, Columns
from axolotl_reft.prompts.spans import PromptSpans
from axolotl_reft.prompts.turns import Turns


@dataclass
class Generation:
    """The input of a call of ``generate``, and its step under way."""

    width: int  # P, cached columns included
    rows: int  # B
    ids_BP: Tensor | None  # None for embeddings
    adapters: Adapters
    record: CacheRecord | None = None  # of the cache's columns, so far as they are kept
    answer_BP: Tensor | None = None  # tokens of answers, so far as they are recorded
    omitted: int = 0  # cached columns that were not handed over again
    kept: int = 0  # cached columns that are as they would be without the cache
    mask_BW: Tensor | None = None  # of the step, 2-D; None for all ones
    past: int = 0  # columns in the cache before the step
    is_decode_step: bool = False  # after the prompt
    filled: int = 0  # columns in the cache before the next step

    def __post_init__(self) -> None:
        self.from_embeddings = self.ids_BP is None

    def go_on(self, record: CacheRecord | None) -> None:
        """Read what is known of the columns of a filled cache."""
        self.record, ids_BP = record, self.ids_BP
        if self.mask_BW is not None:
            self.omitted = max(self.mask_BW.shape[1] - self.width, 0)
        if self.omitted and ids_BP is not None:
            known = record.columns.first(self.omitted) if record else None
            if known is None or known.ids_BW is None or known.width < self.omitted:
                ids_BP = None
            else:
                ids_BP = torch.cat([known.ids_BW.to(ids_BP.device), ids_BP], 1)
        self.ids_BP, self.width = ids_BP, self.width + self.omitted
        if ids_BP is not None and record is not None:
            self.answer_BP = record.columns.answers_in(ids_BP)

    def prepare(self, mask_BW: Tensor | None, tokens: int, has_cache: bool) -> None:
        """Note the step that is next, of so many tokens T.

        Not in its forward, which torch.compile would compile for each width of a mask
        that it saw. From transformers 5.18 on a mask of ones is not handed on, and the
        length of a static cache is on the device, so columns are counted here. Assisted
        decoding takes columns back, but none of the prompt.
        """
        self.mask_BW, past = mask_BW, 0
        if has_cache:
            past = self.filled if mask_BW is None else mask_BW.shape[1] - tokens
        self.go_to(past, tokens)

    def go_to(self, past: int, tokens: int) -> None:
        """Note a step of so many tokens T behind ``past`` columns."""
        self.past, self.filled = past, past + tokens
        self.is_decode_step = past >= self.width

    def prompts(self, turns: Turns, rows: int, device: torch.device) -> PromptSpans:
        """Return the prompts in all P columns, for as many rows as beams make."""
        ids_BP, answer_BP = (
            t if t is None else t.to(device).repeat_interleave(rows // t.shape[0], 0)
            for t in (self.ids_BP, self.answer_BP)
        )
        return turns.spans(self.real(rows, device), ids_BP, None, answer_BP)

    def real(self, rows: int, device: torch.device) -> Tensor:
        """Return the mask (B, P) of the tokens that are not padding."""
        real_BP = torch.ones(rows, self.width, dtype=torch.bool, device=device)
        if self.mask_BW is not None:
            # The mask of a prompt that is prefilled in chunks grows with them.
            seen = min(self.mask_BW.shape[1], self.width)
            real_BP[:, :seen] = self.mask_BW[:, :seen].to(device) != 0
        return real_BP

    def same_columns(self) -> int:
        """Return how many columns of the prompt are the cache's, by their ids."""
        if self.record is None:
            return 0
        known = self.record.columns.first(self.width)
        real_BW = self.real(self.rows, known.real_BW.device)[:, : known.width]
        same_BW = known.real_BW == real_BW
        if known.ids_BW is not None and self.ids_BP is not None:
            ids_BW = self.ids_BP[:, : known.width].to(known.ids_BW.device)
            same_BW &= (known.ids_BW == ids_BW) | ~real_BW
        return int(same_BW.all(0).cumprod(0).sum())

    def recorded(self, sequences: Tensor) -> CacheRecord | None:
        """Return the record of the cache after these sequences, of the tokens that were
        passed as ids and of new ones; None where rows were beams."""
        # None of them where embeddings were passed.
        passed = 0 if self.from_embeddings else self.width - self.omitted
        new_ids_BT = sequences[:, passed:]
        rows, device, mask_BW = self.rows, sequences.device, self.mask_BW
        are_beams = mask_BW is not None and len(mask_BW) != rows
        if len(new_ids_BT) != rows or are_beams or (self.kept and not self.record):
            return None
        real_BP, answer_BP = self.real(rows, device), self.answer_BP
        if answer_BP is None:
            answer_BP = torch.zeros_like(real_BP)
        prompt = Columns(self.ids_BP, answer_BP, real_BP)
        answer_BT = torch.ones_like(new_ids_BT, dtype=torch.bool)
        columns = prompt.followed_by(Columns(new_ids_BT, answer_BT, answer_BT))
        record = self.record or CacheRecord([], 0, prompt)
        return record.read_on(self.kept, prompt, self.adapters, self.filled, columns)

    def step(
        self, turns: Turns, rows: int, tokens: int, device: torch.device
    ) -> PromptSpans:
        """Return the prompts in the T columns of one step."""
        spans = self.prompts(turns, rows, device)
        return spans.columns(self.past, self.past + tokens)
