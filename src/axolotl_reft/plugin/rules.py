"""Rules that refuse settings: tables of rows, and one loop over them.

A row is ``condition: "reason; remedy"``. A condition is a function, or a text: ``key``
is refused where it is set, ``key: value`` where it has or lists that value, ``key > 1``
above one. Keys are paths; ``$NAME`` is an environment variable. The tables are in
``refusals.py`` and ``quantised.py``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel


class Config:
    """axolotl's settings, as written or as validated, and the adapter's block."""

    def __init__(self, settings: Mapping[str, Any], block: Any) -> None:
        environment = {f"${key}": value.lower() for key, value in os.environ.items()}
        read = {"deepspeed": _deepspeed(settings.get("deepspeed"))}
        self.settings = {**settings, **read, **environment}
        self.block = block

    def values(self, path: str) -> Iterator[Any]:
        """The values at ``path``, from every entry of the lists on the way."""
        found: list[Any] = [self.settings]
        for key in path.split("."):
            found = [_mapping(entry).get(key) for entry in found]
            found = [e for v in found for e in (v if _is_rows(v) else [v])]
        yield from (v.value if isinstance(v, Enum) else v for v in found if v)

    def get(self, path: str) -> Any:
        return next(self.values(path), None)


Condition = str | Callable[[Config], str | None]


@dataclass(frozen=True)
class Table:
    """Refusals of one topic.

    Args:
        beside: what they contradict; ``<name>`` is a setting's value.
        rows: a ``Condition`` each, with reason and remedy. A function returns the
            offending "KEY: VALUE", or None.
        when: whether the table applies.
    """

    beside: str
    rows: Mapping[Any, str]
    when: Callable[[Config], Any] = lambda config: True


def refuse(tables: tuple[Table, ...], settings: Mapping[str, Any], block: Any) -> None:
    """Raise the first refusal: "KEY: VALUE with adapter: loreft: REASON; REMEDY".

    Args:
        settings: axolotl's config, as written or as validated.
        block: the adapter's settings.

    Raises:
        ValueError: the setting, its value, the reason, and the remedy.
    """
    config = Config(settings, block)

    def value(match: re.Match[str]) -> str:
        return str(config.get(match[1]) or getattr(block, match[1], ""))

    for table in tables:
        for condition, text in table.rows.items() if table.when(config) else ():
            if subject := find_subject(condition, config):
                beside = re.sub(r"<(\w+)>", value, table.beside)
                raise ValueError(f"{subject} with {beside}: {text}")


def find_subject(condition: Condition, config: Config) -> str | None:
    """The offending "KEY: VALUE" of a row, or None."""
    if not isinstance(condition, str):
        return condition(config)
    key, _, asked = condition.partition(": ")
    if key.endswith(" > 1"):
        key = key.removesuffix(" > 1").removeprefix("$")
        value = str(config.get(condition.removesuffix(" > 1")))
        return f"{key}: {value}" if value.isdecimal() and int(value) > 1 else None
    for value in config.values(key):
        listed = value if isinstance(value, list) else [plain(value)]
        # A plugin is written as its path, and here as its class.
        if not asked or asked in [str(item).rpartition(".")[2] for item in listed]:
            return f"{key.removeprefix('$')}: {asked or plain(value)}"
    return None


def plain(value: Any) -> Any:
    """A value as YAML would show it."""
    return str(value).lower() if isinstance(value, bool) else value


def _mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, BaseModel):
        return dict(value)
    return value if isinstance(value, Mapping) else {}


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, Mapping | BaseModel) for entry in value
    )


def _deepspeed(written: Any) -> Any:
    """DeepSpeed's settings, given whole or by the path of a file."""
    if not isinstance(written, str):
        return written
    try:
        return json.loads(Path(written).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # axolotl reports the path
