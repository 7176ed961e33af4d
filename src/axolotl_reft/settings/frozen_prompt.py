"""The settings ``frozen_prompt`` and ``frozen_prompt_cache``.

They are of a training run, and not saved with the adapter.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from axolotl_reft.errors import shown
from axolotl_reft.prompts.positions import Positions

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]B|)", re.IGNORECASE)
_PLACES = ("host", "device")


class KeptSize(NamedTuple):
    """How much is kept: bytes, None for a share of what is free; and where."""

    bytes: int | None
    on_device: bool


def check_frozen_prompt(value: object, positions: Positions) -> None:
    """Raise ValueError unless it is ``auto``, true or false, and true can be."""
    if value != "auto" and type(value) is not bool:
        raise ValueError(
            f"frozen_prompt: {shown(value)} is unknown; write auto, true or false"
        )
    if value is True and (positions.first or positions.everywhere):
        raise ValueError(
            f"frozen_prompt: true needs positions: l<m>, and positions: {positions} "
            "edits the beginning of the prompt; use frozen_prompt: auto, or l7"
        )


def parse_kept_size(value: Any) -> KeptSize:
    """Read ``frozen_prompt_cache``: a size such as ``8GB``, 0 for nothing, None for a
    share of the free memory; or a mapping of ``host`` or ``device`` to a size."""
    on_device, size = False, value
    if isinstance(value, dict):
        if len(value) != 1 or next(iter(value)) not in _PLACES:
            raise _unknown(value)
        ((place, size),) = value.items()
        on_device = place == "device"
    if size is None:
        return KeptSize(None, on_device)
    match = _SIZE.fullmatch(str(size)) if type(size) in (int, str) else None
    if match is None or (not match[2] and float(match[1])):
        raise _unknown(value)
    return KeptSize(int(float(match[1]) * _UNITS[match[2].upper()]), on_device)


def _unknown(value: object) -> ValueError:
    return ValueError(
        f"frozen_prompt_cache: {shown(value)} is not a size; write for example 8GB, "
        "0 to keep nothing, or {device: 8GB} for the accelerator's memory"
    )
