"""The settings under ``lora``: LoRA beside LoReFT, in one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl_reft.errors import did_you_mean, shown
from axolotl_reft.settings.layers import LARGEST
from axolotl_reft.settings.spec import check_probability

ALL_LINEAR = "all-linear"
# The defaults; an alpha of None is r.
LORA = {"r": 8, "alpha": None, "dropout": 0.0, "target_modules": ALL_LINEAR}


def checked_lora(lora: object) -> dict[str, Any]:
    """Return the settings under ``lora``, each with its value; ValueError if it is no
    mapping, or has an unknown key or a wrong value."""
    if not isinstance(lora, Mapping):
        raise ValueError(
            f"lora: {shown(lora)} is not a mapping; write for example lora: {{r: 8}}"
        )
    for key in lora:
        if key not in LORA:
            # axolotl's keys for LoRA have a prefix.
            hint = did_you_mean(str(key).removeprefix("lora_"), tuple(LORA))
            raise ValueError(
                f"lora: unknown key {shown(key)}.{hint} Known keys: {', '.join(LORA)}"
            )
    settings: dict[str, Any] = dict(LORA)
    settings |= {key: value for key, value in lora.items() if value is not None}
    r, alpha, targets = settings["r"], settings["alpha"], settings["target_modules"]
    if type(r) is not int or not 1 <= r <= LARGEST:
        raise ValueError(
            f"lora: r: {shown(r)} is not a whole number of at least 1; 8 is usual"
        )
    alpha = r if alpha is None else alpha
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    # Beyond these, α/r times a float32 is zero or infinite before long.
    if not is_number or not 1e-6 <= alpha <= 1e6:
        raise ValueError(
            f"lora: alpha: {shown(alpha)} is not a number from 1e-6 to 1e6; r is usual"
        )
    check_probability("lora: dropout", settings["dropout"])
    if targets != ALL_LINEAR:
        listed = targets if isinstance(targets, (list, tuple)) else ()
        if not listed or not all(isinstance(name, str) and name for name in listed):
            raise ValueError(
                f"lora: target_modules: {shown(targets)} is not a list of names; write "
                f"for example [q_proj, v_proj], or {ALL_LINEAR}"
            )
        targets = list(dict.fromkeys(listed))
    return settings | {"alpha": alpha, "target_modules": targets}
