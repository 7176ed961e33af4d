"""``adapter_config.json``, read strictly: PEFT fills in and drops keys, and warns."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from axolotl_reft.errors import did_you_mean
from axolotl_reft.settings.format_version import FORMAT_VERSION, check_format

# PEFT's name for the method; see tuner/peft_type.py.
_METHOD = "LOREFT"

# Their defaults would make another adapter of it.
_NEEDED = (
    "layers",
    "positions",
    "rank",
    "tied_weights",
    "intervention",
    "component",
    "dropout",
    "act_fn",
)


def read_config_file(path: str, known: Collection[str]) -> dict[str, Any]:
    """Read the settings in an ``adapter_config.json``.

    Args:
        known: keys that a LoReFT adapter may have.

    Raises:
        ValueError: it is no adapter's configuration, or, for a LoReFT adapter, lacks a
            setting or has an unknown one.
    """
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except ValueError as error:
        raise ValueError(
            f"{path}: is not readable as JSON ({error}); save the adapter again"
        ) from error
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise ValueError(
            f"{path}: is not an adapter's configuration, which has a peft_type; save "
            "the adapter again"
        )
    if settings["peft_type"] != _METHOD:
        return settings  # left to PEFT
    # Ahead of unknown keys, which a newer format may have.
    check_format(
        settings.get("format_version", FORMAT_VERSION),
        settings.get("axolotl_reft_version"),
    )
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
