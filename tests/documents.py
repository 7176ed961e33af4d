"""YAML as the documents and the recipes show it, through axolotl's own validation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

ROOT = Path(__file__).parents[1]


def validated(settings: dict[str, Any]) -> DictDefault:
    # Copied, since axolotl changes what it is given.
    cfg = DictDefault(yaml.safe_load(yaml.safe_dump(settings)))
    prepare_plugins(cfg)
    return validate_config(cfg)


def dropped(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Paths of the settings in ``given`` that validation did not keep."""
    items = (
        sorted(given.items())
        if isinstance(given, dict)
        else enumerate(given)
        if isinstance(given, list)
        else ()
    )
    for key, value in items:
        where = f"{path}.{key}".removeprefix(".")
        if isinstance(given, dict) and value is not None and key not in kept:
            yield where
        elif value is not None:
            yield from dropped(value, kept[key], where)
