"""Tokens behind a cache, and the prompts that were read when they were computed.

A cache holds keys and values, not tokens. What they were computed from is kept on the
cache itself: copies, saved and loaded caches have it too, and it lives as long.

Shapes: B batch, T tokens of a forward, W columns of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from axolotl_reft.prompts.batch import answered_spans
from axolotl_reft.prompts.spans import PromptSpans
from axolotl_reft.prompts.turns import Turns

_ATTRIBUTE = "loreft_record"


class Adapters(NamedTuple):
    """Names and strengths of the active adapters, or of the adapter of each row."""

    names: tuple[str, ...]
    strengths: tuple[float, ...]
    by_row: bool = False

    def rows(self, name: str, count: int) -> list[float | None]:
        """Return the strength that an adapter has in each row; None where it is not."""
        pairs = zip(self.names, self.strengths, strict=True)
        found = [strength if own == name else None for own, strength in pairs]
        if self.by_row:
            return found
        return [next((s for s in found if s is not None), None)] * count


@dataclass(frozen=True, eq=False)
class Columns:
    """Tokens of consecutive columns.

    Attributes:
        ids_BW: None for embeddings.
        answer_BW: True for tokens of answers, so far as they are known without marks.
        real_BW: False for padding.
        labelled: labels told the answers, also where marks do not.
    """

    ids_BW: Tensor | None
    answer_BW: Tensor
    real_BW: Tensor
    labelled: bool = False

    @property
    def width(self) -> int:
        return self.answer_BW.shape[1]

    def first(self, count: int) -> Columns:
        return self._each(lambda t_BW: t_BW[:, :count])

    def selected(self, rows: Tensor) -> Columns:
        return self._each(lambda t_BW: t_BW[rows])

    def followed_by(self, later: Columns) -> Columns:
        return Columns(
            None
            if self.ids_BW is None or later.ids_BW is None
            else torch.cat([self.ids_BW, later.ids_BW], 1),
            torch.cat([self.answer_BW, later.answer_BW], 1),
            torch.cat([self.real_BW, later.real_BW], 1),
            later.labelled,
        )

    def spans(self, turns: Turns, checks: bool = False) -> PromptSpans:
        """Return the prompts in these columns, the first of their samples; ``checks``
        refuses marks that contradict labels."""
        ids_BW, real_BW, answer_BW = self.ids_BW, self.real_BW, self.answer_BW
        if self.labelled:
            return answered_spans(turns, ids_BW, real_BW, None, answer_BW, checks)
        return turns.spans(real_BW, ids_BW, None, answer_BW)

    def answers_in(self, ids_BP: Tensor) -> Tensor:
        """Return which of these tokens were answers, as far as they are the same."""
        answer_BP = torch.zeros_like(ids_BP, dtype=torch.bool)
        known, device = self.first(ids_BP.shape[1]), ids_BP.device
        if known.ids_BW is not None:
            same_BW = known.ids_BW.to(device) == ids_BP[:, : known.width]
            same_BW = same_BW.cumprod(1).bool()
            answer_BP[:, : known.width] = known.answer_BW.to(device) & same_BW
        return answer_BP

    def _each(self, function: Callable[[Tensor], Tensor]) -> Columns:
        ids_BW = None if self.ids_BW is None else function(self.ids_BW)
        answer_BW, real_BW = function(self.answer_BW), function(self.real_BW)
        return Columns(ids_BW, answer_BW, real_BW, self.labelled)


class Reading(NamedTuple):
    """Columns that were computed together, from ``start`` to the next reading's."""

    start: int
    seen: Columns  # from the cache's first on, in which the prompts were read
    adapters: Adapters


@dataclass(eq=False)
class CacheRecord:
    """The columns of one cache.

    Attributes:
        readings: in the order of the columns; decode steps belong to the one before.
        computed: columns in the cache when it was seen last. More may be known: the
            last token that ``generate`` gave was never computed.
    """

    readings: list[Reading]
    computed: int
    _columns: Columns
    _starts_BW: Tensor | None = None  # where samples of the first reading begin
    # Of decode steps, joined when somebody asks: a step must not copy all before it.
    _decoded: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = self._columns.answer_BW.shape[0]
        self._known = self._columns.width

    @staticmethod
    def of(cache: Any) -> CacheRecord | None:
        """Return what is known of a cache."""
        return getattr(cache, _ATTRIBUTE, None)

    @staticmethod
    def put(cache: Any, record: CacheRecord | None) -> None:
        """Note what is known of a cache."""
        if record is None and hasattr(cache, _ATTRIBUTE):
            delattr(cache, _ATTRIBUTE)
        elif record is not None and not isinstance(cache, (list, tuple)):
            setattr(cache, _ATTRIBUTE, record)

    @property
    def columns(self) -> Columns:
        if self._decoded:
            ids_BT, self._decoded = torch.cat(self._decoded, 1), []
            answer_BT = torch.ones_like(ids_BT, dtype=torch.bool)
            later = Columns(ids_BT, answer_BT, answer_BT)
            self._columns = self._columns.followed_by(later)
        return self._columns

    @cached_property
    def is_packed(self) -> bool:
        """Whether a row holds several samples."""
        if self._starts_BW is None:
            return False
        starts_BW = self._starts_BW & self.readings[0].seen.real_BW
        return bool((starts_BW.sum(1) > 1).any())

    def decode(self, past: int, ids_BT: Tensor) -> None:
        """Add answer tokens after ``past`` columns; others that were there go."""
        if past < self._known:
            self._columns = self.columns.first(past)
        self._decoded.append(ids_BT)
        self._known = self.computed = past + ids_BT.shape[1]

    def read_on(
        self,
        past: int,
        seen: Columns,
        adapters: Adapters,
        computed: int,
        known: Columns | None = None,
    ) -> CacheRecord:
        """Return the record with columns that were computed after the first ``past``,
        with prompts as they are seen now; ``known`` has later columns, too."""
        readings = [reading for reading in self.readings if reading.start < past]
        readings.append(Reading(past, seen, adapters))
        return CacheRecord(readings, computed, known or seen)

    def of_rows(self, rows: int) -> CacheRecord | None:
        """Return the record of so many rows, repeated from one; None where the rows of
        the cache became others."""
        if rows == self.rows:
            return self
        if self.rows != 1 or any(reading.adapters.by_row for reading in self.readings):
            return None
        device = self.columns.real_BW.device
        return self.selected(torch.zeros(rows, dtype=torch.long, device=device))

    def selected(self, rows: Tensor) -> CacheRecord:
        """Return the record of these rows, none of which has an adapter of its own."""
        readings = [r._replace(seen=r.seen.selected(rows)) for r in self.readings]
        return CacheRecord(readings, self.computed, self.columns.selected(rows))
