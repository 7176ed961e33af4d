"""The grammar of positions: ``f7+l7``, ``l1``, ``all``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from axolotl_reft.errors import shown

# At most nine digits: torch's integers end at nineteen. A plus between the two alone.
_COUNT = r"([1-9][0-9]{0,8})"
_GRAMMAR = re.compile(rf"(?:f{_COUNT})?(?:(?(1)\+)l{_COUNT})?")


@dataclass(frozen=True)
class Positions:
    """The prompt positions an intervention edits (arXiv 2404.03592, section 3.3).

    ``first`` and ``last`` count tokens from either end of the prompt, 0 for none;
    ``everywhere`` edits every token, prompt and answer, decode steps included.
    """

    first: int = 0
    last: int = 0
    everywhere: bool = False

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Read ``f<n>``, ``l<n>``, ``f<n>+l<m>`` or ``all``; else ``ValueError``."""
        if text == "all":
            return cls(everywhere=True)
        match = _GRAMMAR.fullmatch(text) if text and isinstance(text, str) else None
        if match is None:
            raise ValueError(
                f"positions: {shown(text)} is not understood. Write f<n> for the first "
                "n prompt tokens, l<n> for the last n, f<n>+l<m> for both (n, m from 1 "
                "to 999999999), or all for every token: for example positions: f7+l7"
            )
        first, last = match.groups()
        return cls(int(first or 0), int(last or 0))

    def __str__(self) -> str:
        if self.everywhere:
            return "all"
        sides = ("f", self.first), ("l", self.last)
        return "+".join(f"{end}{count}" for end, count in sides if count)

    @property
    def two_sided(self) -> bool:
        """Whether the prefix and the suffix are both edited."""
        return bool(self.first and self.last)
