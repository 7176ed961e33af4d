"""Write tokens so that a reader sees which are edited. Free of rich.

Prefix tokens stand in ``« »``, suffix tokens in ``‹ ›``, tokens of ``positions: all``
in ``« »``: brackets that no tokenizer's special tokens have.

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
# By side, and the legend's name of what is in them.
BRACKETS = {
    "prefix": ("«", "prefix", "»"),
    "suffix": ("‹", "suffix", "›"),
    "all": ("«", "every token", "»"),
}
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
    """Decode one token with its leading space, and with line breaks escaped."""
    text, twice = (
        tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        for ids in ([token], [token, token])
    )
    # Some tokenizers drop the leading space of what is decoded first.
    if text and twice == f"{text} {text}":
        text = f" {text}"
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def edited_sides(
    positions: Positions, spans: PromptSpans | None, real_BT: Tensor
) -> dict[str, Tensor]:
    """Return masks (B, T) of the edited tokens by side, on the CPU."""
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
    """Describe the tokens of one sample.

    Args:
        sides: by side, whether each token is edited.
        inside: whether each token is in a prompt.
        trained: whether each token is in an answer; None where the batch had no labels,
            and everything outside prompts counts as an answer.
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


def runs(tokens: list[ShownToken], keep: int | None = None) -> list[tuple[str, str]]:
    """Group neighbours with the same edit into (side or "", text with brackets).

    Args:
        keep: shorten a run to this many tokens, an edited one to 24; None
            keeps the tokens that are not edited whole.
    """
    found = []
    for side, group in groupby(tokens, key=lambda token: token.edited):
        texts = [token.text for token in group]
        if side:
            left, _, right = BRACKETS[side]
            edits = BETWEEN.join(_shortened(texts, 24))
            found.append((side, f"{left}{edits}{right}"))
        else:
            found.append(("", "".join(_shortened(texts, keep) if keep else texts)))
    return found


def plain_line(tokens: list[ShownToken]) -> str:
    """Return tokens as one line of plain text, long runs shortened."""
    return "".join(text for _, text in runs(tokens, keep=12))


def _shortened(texts: list[str], keep: int) -> list[str]:
    if len(texts) <= keep + 1:
        return texts
    half = keep // 2
    left_out = f" … {len(texts) - 2 * half} tokens … "
    return [*texts[:half], left_out, *texts[-half:]]


def legend(tokens: Iterable[ShownToken]) -> str:
    """Explain the brackets around these tokens; empty if no token is edited."""
    edited = {token.edited for token in tokens}
    signs = ["".join(signs) for side, signs in BRACKETS.items() if side in edited]
    return f"{' '.join(signs)}, with {BETWEEN} between two tokens" if signs else ""


def parts(tokens: list[ShownToken]) -> list[tuple[str, list[ShownToken]]]:
    """Group the tokens into prompts, answers and the rest, in their order."""
    return [
        (part, list(group)) for part, group in groupby(tokens, key=lambda t: t.part)
    ]
