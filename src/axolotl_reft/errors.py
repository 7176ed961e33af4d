"""Values of the user's in messages, whatever they are: a message must not fail."""

from __future__ import annotations

from difflib import get_close_matches
from reprlib import Repr

# Longer ones are no slip of the pen, and comparing them takes minutes.
_LONGEST_NAME = 64


class _Shortened(Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 40
        self.maxstring = self.maxlong = self.maxother = 200

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out more than 4300 digits.
        if x.bit_length() > 1000:
            return f"<a number of {x.bit_length()} bits>"
        return super().repr_int(x, level)


_SHORTENED = _Shortened()


def shown(value: object) -> str:
    """A value's repr, shortened where it is long."""
    return _SHORTENED.repr(value)


def did_you_mean(value: object, choices: tuple[str, ...], likeness: float = 0.6) -> str:
    """`` Did you mean 'rank'?``, or nothing where nothing is near."""
    if not isinstance(value, str) or len(value) > _LONGEST_NAME:
        return ""
    as_written = {choice.lower(): choice for choice in choices}
    near = get_close_matches(value.lower(), as_written, n=1, cutoff=likeness)
    return f" Did you mean {as_written[near[0]]!r}?" if near else ""
