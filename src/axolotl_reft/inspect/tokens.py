"""Write tokens so that a reader sees which are edited, without rich.

Prefix tokens stand in ``« »``, suffix tokens in ``‹ ›``, tokens of ``positions: all``
in ``« »``: brackets that no tokenizer's special tokens have.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor

from axolotl_reft.prompts.positions import Positions
from axolotl_reft.prompts.spans import PromptSpans

# The values of ``ShownToken.edited``, in the order that ``edited_sides`` numbers them.
SIDES = (None, "prefix", "suffix", "all")
_SIGNS = {"prefix": "«prefix»", "suffix": "‹suffix›", "all": "«every token»"}
_BETWEEN = "·"
_MAX_EDITED = 24


class ShownToken(NamedTuple):
    """A token as text.

    Attributes:
        edited: one of ``SIDES``.
        part: prompt, answer (trained), or other (neither, such as a later turn's
            question that is not edited).
    """

    text: str
    edited: str | None
    part: str = "prompt"


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
) -> Tensor:
    """Return the place of each token's side in ``SIDES`` (B, T), on the CPU.

    Args:
        spans: the prompts; None where every token is edited.
    """
    if spans is None:
        return real_BT.cpu() * SIDES.index("all")
    prefix_BT, suffix_BT = spans.edited(positions)
    return (prefix_BT + 2 * suffix_BT).cpu()


def runs(
    tokens: Iterable[ShownToken], keep: int = sys.maxsize
) -> list[tuple[str, str]]:
    """Group neighbours with the same edit into (side or "", text with brackets).

    Args:
        keep: shorten longer runs of tokens that are not edited.
    """
    found = []
    for side, group in groupby(tokens, key=lambda token: token.edited):
        texts = [token.text for token in group]
        if side is None:
            found.append(("", "".join(_shortened(texts, keep))))
        else:
            text = _BETWEEN.join(_shortened(texts, _MAX_EDITED))
            found.append((side, f"{_SIGNS[side][0]}{text}{_SIGNS[side][-1]}"))
    return found


def _shortened(texts: list[str], keep: int) -> list[str]:
    if len(texts) <= keep + 1:
        return texts
    half = keep // 2
    left_out = f" … {len(texts) - 2 * half} tokens … "
    return [*texts[:half], left_out, *texts[-half:]]


def legend(tokens: Iterable[ShownToken]) -> str:
    """Explain the brackets around these tokens; empty if no token is edited."""
    edited = {token.edited for token in tokens}
    signs = " ".join(sign for side, sign in _SIGNS.items() if side in edited)
    return f"{signs}, with {_BETWEEN} between two tokens" if signs else ""
