"""Which tokens of a batch are edited, written so that a reader can check it.

Prefix tokens stand in ``« »``, suffix tokens in ``‹ ›``, tokens of ``positions: all``
in ``« »``, signs that no tokenizer's special tokens are written with; prompts, answers
and what is neither are told apart.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from axolotl_reft.prompts.positions import Positions
from axolotl_reft.prompts.spans import PromptSpans

PROMPT, ANSWER, OTHER = "prompt", "answer", "other"
BRACKETS = {"prefix": ("«", "»"), "suffix": ("‹", "›"), "all": ("«", "»")}
BETWEEN = "·"


@dataclass(frozen=True)
class ShownToken:
    """A token as text.

    Attributes:
        part: prompt, answer (trained), or other (neither, such as a later turn's
            question that is not edited).
        edited: prefix, suffix, all, or None.
    """

    text: str
    part: str
    edited: str | None


def token_text(tokenizer: Any, token: int) -> str:
    """One token as text, with the space that it begins with and no line breaks."""
    text, twice = (
        tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        for ids in ([token], [token, token])
    )
    # Some drop a leading space from what is decoded first.
    if text and twice == f"{text} {text}":
        text = f" {text}"
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def edited_sides(
    positions: Positions, spans: PromptSpans | None, real_BT: Tensor
) -> dict[str, Tensor]:
    """Masks (B, T) of what is edited, by side, on the CPU."""
    if positions.everywhere:
        return {"all": real_BT.cpu()}
    if spans is None:
        none_BT = torch.zeros_like(real_BT, device="cpu")
        return {"prefix": none_BT, "suffix": none_BT}
    prefix_BT, suffix_BT = spans.edited(positions)
    return {"prefix": prefix_BT.cpu(), "suffix": suffix_BT.cpu()}


def shown_tokens(
    tokenizer: Any,
    ids: list[int],
    sides: dict[str, list[bool]],
    inside: list[bool],
    trained: list[bool] | None,
) -> list[ShownToken]:
    """The tokens of one sample.

    Args:
        sides: as :func:`edited_sides`, of this sample.
        inside: of a prompt.
        trained: of an answer; None where the batch had no labels, and what follows the
            prompt counts as the answer.
    """
    shown = []
    for place, token in enumerate(ids):
        edited = next((name for name, mask in sides.items() if mask[place]), None)
        if inside[place]:
            part = PROMPT
        elif trained is None or trained[place]:
            part = ANSWER
        else:
            part = OTHER
        shown.append(ShownToken(token_text(tokenizer, token), part, edited))
    return shown


def runs(tokens: list[ShownToken]) -> list[tuple[str | None, list[str]]]:
    """Neighbours that are edited alike: the side, and their texts."""
    return [
        (edited, [token.text for token in group])
        for edited, group in groupby(tokens, key=lambda token: token.edited)
    ]


def plain_line(tokens: list[ShownToken], keep: int = 12) -> str:
    """The tokens of one part in one line; long stretches without edits shortened.

    Args:
        keep: tokens of such a stretch, or of a longer run of edits, to show at most.
    """
    return "".join(
        bracketed(edited, texts, keep) if edited else "".join(_shortened(texts, keep))
        for edited, texts in runs(tokens)
    )


def bracketed(side: str, texts: list[str], keep: int) -> str:
    """A run of edited tokens, with a dot between any two."""
    left, right = BRACKETS[side]
    return left + BETWEEN.join(_shortened(texts, max(keep, 24))) + right


def legend(tokens: Iterable[ShownToken]) -> str:
    """What the signs mean that occur among these tokens; empty where none does."""
    edited = {token.edited for token in tokens}
    names = {"prefix": "prefix", "suffix": "suffix", "all": "every token"}
    signs = [
        f"{left}{names[side]}{right}"
        for side, (left, right) in BRACKETS.items()
        if side in edited
    ]
    return f"{' '.join(signs)}, with {BETWEEN} between two tokens" if signs else ""


def _shortened(texts: list[str], keep: int) -> list[str]:
    if len(texts) <= keep + 1:
        return texts
    half = keep // 2
    left_out = f" … {len(texts) - 2 * half} tokens … "
    return [*texts[:half], left_out, *texts[-half:]]


def parts(tokens: list[ShownToken]) -> list[tuple[str, list[ShownToken]]]:
    """Prompt, answer and the rest, in the order in which they stand."""
    return [
        (part, list(group)) for part, group in groupby(tokens, key=lambda t: t.part)
    ]
