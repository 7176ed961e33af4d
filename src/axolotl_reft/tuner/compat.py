"""The one place where versions of transformers and PEFT are told apart."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from importlib.metadata import version
from typing import Any

from packaging.specifiers import SpecifierSet
from torch import nn
from transformers import Cache

# Caches of other classes: RWKV's, XLNet's, Reformer's, xLSTM's.
_OTHER_CACHES = ("state", "mems", "past_buckets_states", "cache_params")

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


def cache_of(holder: object) -> Any:
    """Return the cache among a model's arguments or outputs: a ``Cache`` by its class,
    which transformers 5.24 calls ``cache``, earlier releases ``past_key_values``; or
    what some models have instead."""
    if isinstance(holder, Mapping):
        caches = (held for held in holder.values() if isinstance(held, Cache))
        found = next(caches, None)
        if found is None:
            found = next((c for n in _OTHER_CACHES if (c := holder.get(n))), None)
        return found
    if not isinstance(holder, tuple):
        return None
    return next((held for held in holder if isinstance(held, Cache)), None)


def forward_parameters(module: nn.Module) -> list[str]:
    """Return the names of a forward's parameters as the class has them; a forward that
    another library put on the instance may take anything."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def cache_name(parameters: Container[str]) -> str | None:
    """Return the parameter of a model's forward that takes a ``Cache``."""
    return next((n for n in ("cache", "past_key_values") if n in parameters), None)


def pages_of(inputs: Mapping[str, object]) -> object | None:
    """Return the pages of continuous batching, which every release calls ``cache``."""
    held = inputs.get("cache")
    return None if isinstance(held, Cache) else held
