"""Rules that refuse settings: tables of rows, and one loop over them.

A table is a condition and its rows, ``condition: "reason; remedy"``. A condition is
``key``, which must be set, or ``key = pattern``, a regular expression that the whole
value, or an entry of a list, must match, or a function that returns the offending
"KEY: VALUE", or a tuple of such. Keys are paths; ``$NAME`` is an environment variable.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

Settings = Mapping[str, Any]
Condition = str | Callable[[Settings], str | None] | tuple["Condition", ...]
Table = tuple[Condition, Mapping[Any, str]]


def refuse(tables: tuple[Table, ...], settings: Settings, block: BaseModel) -> None:
    """Raise the first refusal: "KEY: VALUE with adapter: loreft: REASON; REMEDY".

    Args:
        settings: axolotl's config, as written or as validated.
        block: the adapter's settings, which the tables see among axolotl's.

    Raises:
        ValueError: the setting, its value, the reason, and the remedy.
    """
    environment = {f"${key}": value.lower() for key, value in os.environ.items()}
    merged = {**settings, **dict(block), "adapter": "loreft", **environment}
    # DeepSpeed's settings may be the path of a file; axolotl reports a wrong one.
    with suppress(KeyError, OSError, TypeError, ValueError):
        text = Path(merged["deepspeed"]).read_text(encoding="utf-8")
        merged["deepspeed"] = json.loads(text)
    for beside, rows in tables:
        context = find(beside, merged)
        for condition, text in rows.items() if context else ():
            if subject := find(condition, merged):
                raise ValueError(f"{subject} with {context}: {text}")


def find(condition: Condition, settings: Settings) -> str | None:
    """Return the "KEY: VALUE" that a condition is about, or None."""
    if isinstance(condition, tuple):
        return next(filter(None, (find(c, settings) for c in condition)), None)
    if not isinstance(condition, str):
        return condition(settings)
    key, _, pattern = condition.partition(" = ")
    for value in map(plain, values(settings, key)):
        if not pattern or re.fullmatch(pattern, str(value)):
            return f"{key.removeprefix('$')}: {value}"
    return None


def values(settings: Settings, path: str) -> Iterator[Any]:
    """Yield what is set at a path, and of lists on the way every entry."""
    found: list[Any] = [settings]
    for key in path.split("."):
        found = [dict(e).get(key) for e in found if isinstance(e, Mapping | BaseModel)]
        found = [e for v in found for e in (v if isinstance(v, list) else [v])]
    yield from filter(None, found)


def plain(value: Any) -> Any:
    """Return a value as YAML would show it."""
    if isinstance(value, Enum):
        return value.value
    return str(value).lower() if isinstance(value, bool) else value
