"""``adapter_config.json``, read strictly: PEFT fills in and drops keys, and warns."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from axolotl_reft.errors import did_you_mean

# To be raised when an adapter holds what earlier packages would read wrongly.
FORMAT_VERSION = 1
# Their defaults would make another adapter of it.
_NEEDED = (
    "layers positions rank tied_weights intervention component dropout act_fn".split()
)


@cache
def package_version() -> str:
    """Return the installed version; ``unknown`` where the package is not installed."""
    try:
        return version("axolotl-reft")
    except PackageNotFoundError:
        return "unknown"


def check_format(format_version: object, saved_by: object) -> None:
    """Raise ValueError if an adapter of this format, which the package's version
    ``saved_by`` saved, cannot be read."""
    if type(format_version) is not int or format_version < 1:
        raise ValueError(
            f"format_version: {format_version!r} is not a whole number of at least 1; "
            "leave it out, it is written when an adapter is saved"
        )
    if format_version > FORMAT_VERSION:
        raise ValueError(
            f"the adapter has format_version {format_version} (saved by axolotl-reft "
            f"{saved_by or 'of an unnamed version'}), and axolotl-reft "
            f"{package_version()} reads up to {FORMAT_VERSION}; upgrade axolotl-reft"
        )


def read_config_file(path: str, known: Collection[str]) -> dict[str, Any]:
    """Read the settings in ``adapter_config.json``; ValueError if it is no adapter's,
    or a LoReFT adapter's that lacks a setting or has one that is not ``known``."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); save it again") from error
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise ValueError(f"{path}: has no peft_type; save the adapter again")
    # PEFT's name for the method; see tuner/config.py.
    if settings["peft_type"] != "LOREFT":
        return settings  # left to PEFT
    # Ahead of unknown keys, which a newer format may have.
    saved_by = settings.get("axolotl_reft_version")
    check_format(settings.get("format_version", FORMAT_VERSION), saved_by)
    if missing := [key for key in _NEEDED if key not in settings]:
        raise ValueError(
            f"{path}: {missing[0]} is missing; write what the adapter was trained "
            "with, or save it again"
        )
    if unknown := [key for key in settings if key not in known]:
        hint = did_you_mean(unknown[0], tuple(known))
        raise ValueError(
            f"{path}: unknown key {unknown[0]!r}.{hint} Upgrade axolotl-reft and PEFT "
            "if a newer version saved the adapter; otherwise remove the key"
        )
    return settings
