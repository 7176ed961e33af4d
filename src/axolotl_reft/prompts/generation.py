"""Tokens behind a cache, and the prompt that ``generate`` was given.

A reused cache holds keys and values, not tokens. To find the prompts of a conversation
that is played turn by turn, its tokens are remembered beside each cache, as long as the
cache lives.

Shapes: B batch, P columns handed to ``generate``, T tokens of this forward, W columns
seen so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from axolotl_reft.prompts.spans import PromptSpans
from axolotl_reft.prompts.turns import Turns


@dataclass(frozen=True)
class Tokens:
    """Tokens behind a cache, and which of them were answers of the model's."""

    ids_BW: Tensor
    answer_BW: Tensor

    def __getitem__(self, columns: slice) -> Tokens:
        return Tokens(self.ids_BW[:, columns], self.answer_BW[:, columns])

    def followed_by(self, ids_BT: Tensor) -> Tokens:
        """With tokens that were not said to be a prompt, hence answers."""
        answer_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        return Tokens(
            torch.cat([self.ids_BW, ids_BT], 1),
            torch.cat([self.answer_BW, answer_BT], 1),
        )


@dataclass
class _Conversation:
    """Tokens behind one cache, and the ids (B, T) of forwards since, which are
    put together when somebody asks; a decode step must not copy all before it."""

    tokens: Tokens
    since: list[Tensor] = field(default_factory=list)
    rows: int = field(init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows, self.width = self.tokens.ids_BW.shape

    def add(self, ids_BT: Tensor) -> None:
        """Tokens that were not said to be a prompt."""
        self.since.append(ids_BT)
        self.width += ids_BT.shape[1]

    def cut(self, width: int) -> None:
        """Forget what was cut off the cache."""
        if width < self.width:
            self.tokens, self.width = self.whole()[:width], width

    def whole(self) -> Tokens:
        if self.since:
            self.tokens = self.tokens.followed_by(torch.cat(self.since, 1))
            self.since = []
        return self.tokens


class Conversations:
    """The tokens behind each living cache."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[Any, _Conversation] = WeakKeyDictionary()

    def note(self, cache: Any, tokens: Tokens) -> None:
        self._of[cache] = _Conversation(tokens)

    def note_forward(self, cache: Any, past: int, ids_BT: Tensor) -> None:
        """A forward outside ``generate`` has put ``ids_BT`` after ``past`` columns."""
        ids_BT = ids_BT.clone()  # the caller's may be a buffer
        if past == 0:
            self.note(cache, Tokens(ids_BT, torch.zeros_like(ids_BT, dtype=torch.bool)))
            return
        known = self._of.get(cache)
        if known is None or known.rows != ids_BT.shape[0] or known.width < past:
            self._of.pop(cache, None)
            return
        known.cut(past)
        known.add(ids_BT)

    def before(self, cache: Any, past: int, rows: int) -> Tokens | None:
        """The first ``past`` tokens of a cache of ``rows`` rows, if they are known."""
        known = self._of.get(cache)
        if known is None or known.rows != rows or known.width < past:
            return None
        return known.whole()[:past]

    def answers(self, cache: Any, ids_BP: Tensor) -> Tensor | None:
        """Which of these tokens were answers, as far as the cache knows them."""
        conversation = self._of.get(cache)
        if conversation is None or conversation.rows != ids_BP.shape[0]:
            return None
        known = conversation.whole()
        shared = min(known.ids_BW.shape[1], ids_BP.shape[1])
        same_BW = known.ids_BW[:, :shared].to(ids_BP.device) == ids_BP[:, :shared]
        answer_BP = torch.zeros_like(ids_BP, dtype=torch.bool)
        answer_BP[:, :shared] = known.answer_BW[:, :shared].to(ids_BP.device)
        answer_BP[:, :shared] &= same_BW.cumprod(1).bool()
        return answer_BP


@dataclass
class Generation:
    """The input of a call of ``generate``, and its step under way.

    Attributes:
        width: P, cached columns included.
        ids_BP: the tokens; None for embeddings.
        answer_BP: which of them were answers, so far as that is remembered.
        continued: there is a filled cache.
        omitted: cached columns that were not handed over again.
        mask_BW: the 2-D attention mask of the step; None for all ones.
        past: columns in the cache before the step, W - T.
        is_decode_step: the step comes after the prompt.
    """

    width: int
    ids_BP: Tensor | None
    answer_BP: Tensor | None = None
    continued: bool = False
    omitted: int = 0
    mask_BW: Tensor | None = None
    past: int = 0
    is_decode_step: bool = False
    _filled: int = 0

    def start(self, past: int) -> None:
        """Note how many columns are cached before the first step."""
        self._filled = past

    def prepare(self, mask_BW: Tensor | None, tokens: int, has_cache: bool) -> None:
        """Note the step that is next, of so many tokens T.

        Not in its forward: compiled, that would have a graph for each width of a mask
        that it saw. From transformers 5.18 on a mask of ones is not handed on, and the
        length of a static cache is on the device, so columns are counted here. Assisted
        decoding takes columns back, but none of the prompt.
        """
        self.mask_BW = mask_BW
        if mask_BW is not None:
            self.past = mask_BW.shape[1] - tokens
        else:
            self.past = self._filled if has_cache else 0
        self._filled = self.past + tokens
        self.is_decode_step = self.past >= self.width

    def prompts(self, turns: Turns, rows: int, device: torch.device) -> PromptSpans:
        """Return the prompts in all P columns, for as many rows as beams make."""
        real_BP = torch.ones(rows, self.width, dtype=torch.bool, device=device)
        if self.mask_BW is not None:
            # The mask of a prompt that is prefilled in chunks grows with them.
            seen = min(self.mask_BW.shape[1], self.width)
            real_BP[:, :seen] = self.mask_BW[:, :seen].to(device) != 0
        ids_BP, answer_BP = self.ids_BP, self.answer_BP
        if ids_BP is not None:
            ids_BP = ids_BP.to(device).repeat_interleave(rows // ids_BP.shape[0], 0)
        if answer_BP is not None:
            answer_BP = answer_BP.to(device)
            answer_BP = answer_BP.repeat_interleave(rows // answer_BP.shape[0], 0)
        elif self.continued:
            # Nothing is known of the cached tokens: no prompt is edited any more.
            answer_BP = torch.ones_like(real_BP)
        return turns.spans(real_BP, ids_BP, None, answer_BP)

    def step(
        self, turns: Turns, rows: int, tokens: int, device: torch.device
    ) -> PromptSpans | None:
        """Return the prompts in the T columns of one step; None for a decode step."""
        if self.is_decode_step:
            return None
        spans = self.prompts(turns, rows, device)
        return spans.columns(self.past, self.past + tokens)

    def cut(self, turns: Turns, past: int) -> int:
        """Return how many of ``past`` cached columns can be kept for these prompts.

        A cache that ends within a prompt was edited for another end of it.
        """
        if self.ids_BP is None or past >= self.width:
            return past
        spans = self.prompts(turns, self.ids_BP.shape[0], self.ids_BP.device)
        ranks_B = spans.rank_BT[:, past].where(spans.inside_BT[:, past], 0)
        return past - int(ranks_B.max())


def cut_back(cache: Any, past: int, keep: int, has_new_tokens_alone: bool) -> None:
    """Drop the cached columns of a prompt that ended elsewhere then.

    Raises:
        ValueError: the cache cannot be cut, or the cut tokens are not handed over.
    """
    remedy = "pass a fresh cache and the whole conversation"
    if has_new_tokens_alone:
        raise ValueError(
            f"past_key_values: the cache ends within a prompt, {past - keep} tokens of "
            "it are cached and the rest is new, so that its first and last tokens "
            f"cannot be told; {remedy}"
        )
    try:
        cache.crop(keep - past)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            "past_key_values: the cache ends within a prompt and was edited for "
            f"another end of it, and a {type(cache).__name__} cannot be cut back "
            f"({error}); {remedy}"
        ) from error
