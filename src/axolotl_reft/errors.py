"""Helpers for error messages."""

from difflib import get_close_matches
from reprlib import Repr

_SHORT = Repr()
_SHORT.maxlevel = 4
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = 40
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200

# The repr of a value, shortened where it is long.
shown = _SHORT.repr


def did_you_mean(value: object, choices: tuple[str, ...], cutoff: float = 0.6) -> str:
    """Return `` Did you mean 'rank'?`` for a near miss of a choice, else nothing."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    near = get_close_matches(str(value).lower(), by_lower_case, n=1, cutoff=cutoff)
    return f" Did you mean {by_lower_case[near[0]]!r}?" if near else ""
