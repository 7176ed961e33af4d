"""The one place where versions of transformers and PEFT are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from packaging.specifiers import SpecifierSet
from transformers import Cache

# pyproject.toml declares the same, and says why.
SUPPORTED = {"transformers": ">=5.16.1,<5.25", "peft": ">=0.20,<0.22"}


def check_versions() -> None:
    """Refuse untested releases, by a ValueError: axolotl
    swallows the ImportError of a plugin."""
    for package, wanted in SUPPORTED.items():
        found = version(package)
        if not SpecifierSet(wanted).contains(found, prereleases=True):
            raise ValueError(
                f"axolotl-reft needs {package}{wanted}, and {found} is installed; "
                f"run: pip install '{package}{wanted}'"
            )


def cache_of(holder: object) -> Cache | None:
    """Return the key-value cache among a model's arguments or outputs, by its class:
    transformers 5.24 calls it ``cache``, earlier releases ``past_key_values``."""
    if isinstance(holder, Mapping):
        holder = holder.values()
    elif not isinstance(holder, tuple):
        return None
    return next((held for held in holder if isinstance(held, Cache)), None)


def pages_of(inputs: Mapping[str, object]) -> object | None:
    """Return the pages of continuous batching, which every release calls ``cache``."""
    held = inputs.get("cache")
    return None if isinstance(held, Cache) else held
