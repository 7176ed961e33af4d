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
_ALPHAS = (1e-6, 1e6)


def checked_lora(lora: object) -> dict[str, Any]:
    """Return the settings under ``lora``, each with its value.

    Raises:
        ValueError: it is no mapping, or has an unknown key or a wrong value.
    """
    if not isinstance(lora, Mapping):
        raise ValueError(
            f"lora: {shown(lora)} is not a mapping; write for example lora: {{r: 8}}, "
            "or leave it out for LoReFT alone"
        )
    for key in lora:
        if key not in LORA:
            raise ValueError(
                f"lora: unknown key {shown(key)}."
                f"{did_you_mean(_bare(key), tuple(LORA))} Known keys: {', '.join(LORA)}"
            )
    settings = LORA | {key: value for key, value in lora.items() if value is not None}
    r, alpha = settings["r"], settings["alpha"]
    if type(r) is not int or not 1 <= r <= LARGEST:
        raise ValueError(
            f"lora: r: {shown(r)} is not a whole number of at least 1 and at most the "
            "hidden size; 8 is usual"
        )
    _check_alpha(r if alpha is None else alpha)
    alpha = r if alpha is None else alpha
    dropout = settings["dropout"]
    check_probability("lora: dropout", dropout)
    targets = _checked_targets(settings["target_modules"])
    return {"r": r, "alpha": alpha, "dropout": dropout, "target_modules": targets}


def _bare(key: object) -> object:
    """Return a key without the prefix that axolotl's keys for LoRA have."""
    return key.removeprefix("lora_") if isinstance(key, str) else key


def _check_alpha(alpha: object) -> None:
    low, high = _ALPHAS
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"lora: alpha: {shown(alpha)} is not a number; r is usual")
    # Beyond these, α/r times a float32 is zero or infinite before long.
    if not low <= alpha <= high:
        raise ValueError(
            f"lora: alpha: {shown(alpha)} is not a number from {low:g} to {high:g}; r "
            "is usual"
        )


def _checked_targets(targets: object) -> str | list[str]:
    if targets == ALL_LINEAR:
        return ALL_LINEAR
    if not isinstance(targets, (list, tuple)) or not targets:
        raise ValueError(
            f"lora: target_modules: {shown(targets)} is not a list of names; write for "
            f"example [q_proj, v_proj], or {ALL_LINEAR}"
        )
    for name in targets:
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"lora: target_modules: {shown(name)} is not the name of a module"
            )
    return list(dict.fromkeys(targets))
