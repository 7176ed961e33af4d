"""Tokens behind a cache, and the prompt that ``generate`` was given.

A reused cache holds keys and values, not tokens. To find the prompts of a conversation
that is played turn by turn, its tokens are remembered as long as the cache lives.

Shapes: B batch, P columns handed to ``generate``, T tokens of this forward, W columns
seen so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_reft.prompts.spans import PromptSpans
from axolotl_reft.prompts.turns import Turns


class Tokens(NamedTuple):
    """Tokens behind a cache, and which of them were answers of the model's."""

    ids_BW: Tensor
    answer_BW: Tensor

    def first(self, columns: int) -> Tokens:
        return Tokens(*(tensor_BW[:, :columns] for tensor_BW in self))

    def followed_by(self, ids_BT: Tensor) -> Tokens:
        """Return these and others that were not said to be a prompt, hence answers."""
        more = ids_BT, torch.ones_like(ids_BT, dtype=torch.bool)
        return Tokens(*(torch.cat(pair, 1) for pair in zip(self, more, strict=True)))


class _Conversation:
    """Tokens behind one cache, put together when somebody asks: a decode step must not
    copy all before it."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens, self._since = tokens, list[Tensor]()
        self.rows, self.width = tokens.ids_BW.shape

    def put(self, past: int, ids_BT: Tensor) -> None:
        """Put tokens after ``past`` columns; forget others that were there."""
        if past < self.width:
            self._tokens = self.tokens().first(past)
        self._since.append(ids_BT)
        self.width = past + ids_BT.shape[1]

    def tokens(self) -> Tokens:
        if self._since:
            self._tokens = self._tokens.followed_by(torch.cat(self._since, 1))
            self._since = []
        return self._tokens


class Conversations:
    """The tokens behind each living cache."""

    def __init__(self) -> None:
        self._by_cache: WeakKeyDictionary[Any, _Conversation] = WeakKeyDictionary()

    def _find(self, cache: Any, rows: int, width: int) -> _Conversation | None:
        """Return what is known of a cache of these rows and at least this width."""
        known = self._by_cache.get(cache)
        if known is None or known.rows != rows or known.width < width:
            return None
        return known

    def note(self, cache: Any, tokens: Tokens) -> None:
        self._by_cache[cache] = _Conversation(tokens)

    def note_forward(self, cache: Any, past: int, ids_BT: Tensor) -> None:
        """Note a forward outside ``generate`` of ``ids_BT`` after ``past`` columns."""
        ids_BT = ids_BT.clone()  # the caller's may be a buffer
        if past == 0:
            self.note(cache, Tokens(ids_BT, torch.zeros_like(ids_BT, dtype=torch.bool)))
        elif known := self._find(cache, ids_BT.shape[0], past):
            known.put(past, ids_BT)
        else:
            self._by_cache.pop(cache, None)

    def before(self, cache: Any, past: int, rows: int) -> Tokens | None:
        """Return the first ``past`` tokens of a cache of ``rows`` rows, if known."""
        known = self._find(cache, rows, past)
        return known.tokens().first(past) if known else None

    def answers(self, cache: Any, ids_BP: Tensor) -> Tensor | None:
        """Return which of these tokens were answers, as far as the cache knows them."""
        known = self._find(cache, ids_BP.shape[0], 0)
        if known is None:
            return None
        width, device = ids_BP.shape[1], ids_BP.device
        ids_BW, answer_BW = (t_BW.to(device) for t_BW in known.tokens().first(width))
        shared = ids_BW.shape[1]
        same_BW = (ids_BW == ids_BP[:, :shared]).cumprod(1).bool()
        return F.pad(answer_BW & same_BW, (0, width - shared))


@dataclass
class Generation:
    """The input of a call of ``generate``, and its step under way."""

    width: int  # P, cached columns included
    ids_BP: Tensor | None  # None for embeddings
    answer_BP: Tensor | None = None  # tokens of answers, so far as they are remembered
    continued: bool = False  # on a filled cache
    omitted: int = 0  # cached columns that were not handed over again
    mask_BW: Tensor | None = None  # of the step, 2-D; None for all ones
    past: int = 0  # columns in the cache before the step
    is_decode_step: bool = False  # after the prompt
    filled: int = 0  # columns in the cache before the next step

    def prepare(self, mask_BW: Tensor | None, tokens: int, has_cache: bool) -> None:
        """Note the step that is next, of so many tokens T.

        Not in its forward, which torch.compile would compile for each width of a mask
        that it saw. From transformers 5.18 on a mask of ones is not handed on, and the
        length of a static cache is on the device, so columns are counted here. Assisted
        decoding takes columns back, but none of the prompt.
        """
        self.mask_BW = mask_BW
        if mask_BW is not None:
            self.past = mask_BW.shape[1] - tokens
        else:
            self.past = self.filled if has_cache else 0
        self.filled = self.past + tokens
        self.is_decode_step = self.past >= self.width

    def prompts(self, turns: Turns, rows: int, device: torch.device) -> PromptSpans:
        """Return the prompts in all P columns, for as many rows as beams make."""
        real_BP = torch.ones(rows, self.width, dtype=torch.bool, device=device)
        if self.mask_BW is not None:
            # The mask of a prompt that is prefilled in chunks grows with them.
            seen = min(self.mask_BW.shape[1], self.width)
            real_BP[:, :seen] = self.mask_BW[:, :seen].to(device) != 0
        ids_BP, answer_BP = (
            t if t is None else t.to(device).repeat_interleave(rows // t.shape[0], 0)
            for t in (self.ids_BP, self.answer_BP)
        )
        if answer_BP is None and self.continued:
            # Nothing is known of the cached tokens: no prompt is edited any more.
            answer_BP = torch.ones_like(real_BP)
        return turns.spans(real_BP, ids_BP, None, answer_BP)

    def step(
        self, turns: Turns, rows: int, tokens: int, device: torch.device
    ) -> PromptSpans:
        """Return the prompts in the T columns of one step."""
        spans = self.prompts(turns, rows, device)
        return spans.columns(self.past, self.past + tokens)

    def reusable(self, turns: Turns, past: int) -> int:
        """Return how many of ``past`` cached columns can be kept for these prompts: a
        cache that ends within a prompt was edited for another end of it."""
        if self.ids_BP is None or past >= self.width:
            return past
        spans = self.prompts(turns, self.ids_BP.shape[0], self.ids_BP.device)
        places_B = spans.place_BT[:, past].where(spans.inside_BT[:, past], 0)
        return past - int(places_B.max())


def crop(cache: Any, past: int, keep: int, has_new_tokens_alone: bool) -> None:
    """Drop the cached columns of a prompt that ended elsewhere then; ``ValueError`` if
    the cache cannot be cut, or the cut tokens are not handed over."""
    reason = f"its last {past - keep} tokens were not passed again"
    if not has_new_tokens_alone:
        try:
            cache.crop(keep - past)
            return
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            reason = f"a {type(cache).__name__} cannot be cut back ({error})"
    raise ValueError(
        "past_key_values: the cache ends within a prompt, whose edited positions have "
        f"moved, and {reason}; pass a fresh cache and the whole conversation"
    )
