"""``adapter_config.json``, read strictly: PEFT fills in and drops keys, and warns."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from axolotl_reft.errors import did_you_mean, shown
from axolotl_reft.settings.format_version import FORMAT_VERSION, check_format

# PEFT's name for the method; see tuner/peft_type.py.
_METHOD = "LOREFT"

# Without one of these an adapter would be another one, with the default in its place.
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
    """The settings in an ``adapter_config.json``.

    Args:
        known: keys that a LoReFT adapter may have.

    Raises:
        ValueError: it is no JSON object, says something twice, or, for a LoReFT
            adapter, lacks a setting or has an unknown one.
    """
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: is not readable as JSON ({error}); save the adapter again"
        ) from error
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise ValueError(
            f"{path}: is not an adapter's configuration, which has a peft_type; save "
            "the adapter again"
        )
    if settings["peft_type"] != _METHOD:
        return settings  # PEFT makes another method's of it
    # Ahead of unknown keys, which a newer format may have.
    check_format(
        settings.get("format_version", FORMAT_VERSION),
        settings.get("axolotl_reft_version"),
    )
    for key in _NEEDED:
        if key not in settings:
            raise ValueError(
                f"{path}: {key} is missing; write what the adapter was trained with, "
                "or save it again"
            )
    for key in settings:
        if key not in known:
            raise ValueError(
                f"{path}: unknown key {shown(key)}.{did_you_mean(key, tuple(known))} "
                "Upgrade axolotl-reft and PEFT if a newer version saved the adapter; "
                "otherwise remove the key"
            )
    return settings


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    settings = dict(pairs)
    if len(settings) < len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise ValueError(f"{shown(twice)} is written twice")
    return settings
