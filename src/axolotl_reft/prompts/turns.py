"""The turns of a conversation, read from its token ids.

Labels tell prompt from answer in training alone. A chat template's own marks are there
at inference too, so where an adapter knows them, both read the same ids by the same
rule and edit the same tokens. Torch only.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_reft.errors import shown
from axolotl_reft.prompts.spans import (
    PromptSpans,
    any_in_sample,
    count_in_sample,
    prompt_spans,
)


@dataclass(frozen=True)
class Turns:
    """Which turns of a conversation are edited, and what marks them.

    Attributes:
        every: the prompt of each turn is edited; otherwise the first turn's alone.
        generation_prompts: token ids after which an answer begins, such as those of
            ``<|im_start|>assistant\\n``; one sequence for each chat template.
        end_of_turn: tokens that end an answer, and still belong to it.
    """

    every: bool = True
    generation_prompts: tuple[tuple[int, ...], ...] = ()
    end_of_turn: tuple[int, ...] = ()

    @classmethod
    def parse(cls, turns: str, markers: Mapping[str, Any] | None = None) -> Turns:
        """Read the adapter's settings ``turns`` and ``turn_markers``; ``ValueError`` if
        they are not understood."""
        if turns not in ("every", "first"):
            raise ValueError(
                f"turns: {shown(turns)} is unknown. Write turns: every to edit the "
                "prompt of each turn of a conversation, or turns: first"
            )
        if markers is None:
            return cls(turns == "every")
        try:
            prompts, ends = markers["generation_prompts"], markers["end_of_turn"]
            valid = prompts and all(map(_are_ids, [*prompts, ends]))
        except (KeyError, TypeError):
            valid = False
        if not valid or len(markers) != 2:
            raise ValueError(
                f"turn_markers: {shown(markers)} is not understood. Write token ids as "
                "generation_prompts (a list of lists) and end_of_turn (a list), which "
                "axolotl_reft.turn_markers(tokenizer) finds"
            )
        return cls(turns == "every", tuple(map(tuple, prompts)), tuple(ends))

    def ends(self, ids_BT: Tensor) -> Tensor:
        """Return True for tokens that end an answer."""
        ends_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for token in self.end_of_turn:
            ends_BT = ends_BT | (ids_BT == token)
        return ends_BT

    def answers(
        self, ids_BT: Tensor, starts_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read from the marks which tokens are answers.

        An end of turn within a generation prompt ends nothing: some templates announce
        each part of an answer, such as its thought, anew.

        Returns:
            True for tokens of an answer: after a generation prompt, up to and with
            the end of the turn; and True where a generation prompt ends. Of samples
            without any nothing is known.
        """
        opens_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        closes_BT = self.ends(ids_BT)
        for mark in self.generation_prompts:
            found_BT = _ends_of(mark, ids_BT)
            opens_BT = opens_BT | found_BT
            for behind, token in enumerate(reversed(mark)):
                if token in self.end_of_turn:
                    closes_BT = closes_BT > F.pad(found_BT, (-behind, behind))
        number_BT = opens_BT.long().cumsum(1)
        closed_BT = (number_BT * closes_BT).cummax(1).values
        # Both as they stood before the token itself.
        number_BT = number_BT - opens_BT.long()
        closed_BT = F.pad(closed_BT, (1, -1))
        opened_BT = count_in_sample(opens_BT, starts_BT) > opens_BT.long()
        return opened_BT & (number_BT > closed_BT), opens_BT

    def spans(
        self,
        real_BT: Tensor,
        ids_BT: Tensor | None = None,
        starts_BT: Tensor | None = None,
        answer_BT: Tensor | None = None,
    ) -> PromptSpans:
        """Return the prompts of a batch (:func:`prompt_spans`): by the marks where a
        sample has them, else by ``answer_BT``. Ids are None for embeddings."""
        if ids_BT is not None and self.generation_prompts:
            marked_BT, opens_BT = self.answers(ids_BT, starts_BT)
            if answer_BT is not None:
                found_BT = any_in_sample(opens_BT, starts_BT)
                marked_BT = marked_BT.where(found_BT, answer_BT)
            answer_BT = marked_BT
        return prompt_spans(real_BT, starts_BT, answer_BT, self.every)


def _are_ids(ids: Any) -> bool:
    """Whether these are token ids, one or more."""
    is_list = isinstance(ids, (list, tuple)) and len(ids) > 0
    return is_list and all(type(i) is int and 0 <= i < 2**31 for i in ids)


def _ends_of(mark: Sequence[int], ids_BT: Tensor) -> Tensor:
    """Return True at the last token of each occurrence of a mark."""
    first, *others = mark
    match_BT = ids_BT == first
    for token in others:
        match_BT = F.pad(match_BT, (1, -1)) & (ids_BT == token)
    return match_BT
