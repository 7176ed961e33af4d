"""The grammar of positions: ``f7+l7``, ``l1``, ``all``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from axolotl_reft.errors import shown

# At most nine digits: torch's integers end at nineteen.
_GRAMMAR = re.compile(
    r"(?:f(?P<first>[1-9]\d{0,8}))?(?P<plus>\+)?(?:l(?P<last>[1-9]\d{0,8}))?", re.ASCII
)


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
        """Read ``f<n>``, ``l<n>``, ``f<n>+l<m>`` or ``all``.

        Raises:
            ValueError: ``text`` is none of these.
        """
        if text == "all":
            return cls(everywhere=True)
        match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
        if match:
            first, last = int(match["first"] or 0), int(match["last"] or 0)
            if bool(match["plus"]) == bool(first and last) and (first or last):
                return cls(first, last)
        raise ValueError(
            f"positions: {shown(text)} is not understood. Write f<n> for the first n "
            "prompt tokens, l<n> for the last n, f<n>+l<m> for both (n, m from 1 to "
            "999999999), or all for every token: for example positions: f7+l7"
        )

    def __str__(self) -> str:
        if self.everywhere:
            return "all"
        sides = [f"f{self.first}"] * bool(self.first) + [f"l{self.last}"] * bool(
            self.last
        )
        return "+".join(sides)

    @property
    def two_sided(self) -> bool:
        """Whether the prefix and the suffix are both edited."""
        return bool(self.first and self.last)
