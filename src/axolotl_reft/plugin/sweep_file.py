"""Read a file of settings to try, as axolotl's ``--sweep`` takes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from axolotl_reft.errors import shown
from axolotl_reft.plugin.args import set_nested

PLUGIN = "axolotl_reft.LoreftPlugin"
# axolotl's own default.
_OUTPUT_DIR = "./model-out"
_PAIRED = "_"
_LONGEST_VALUE, _LONGEST_NAME = 60, 200


@dataclass
class SweptRun:
    """One run of a sweep.

    Attributes:
        settings: the swept keys, with dots for nested ones, and their values.
        varying: those that not all runs have alike.
        config: axolotl's whole config, its output_dir below the sweep's.
    """

    settings: dict[str, Any]
    varying: list[str]
    config: dict[str, Any]

    @property
    def directory(self) -> Path:
        return Path(self.config["output_dir"])


def read_sweep(config: str, sweep: str) -> list[SweptRun]:
    """Return every combination of the settings, in the file's order; ValueError if the
    files do not say what to run."""
    base, swept = _read(config, "CONFIG"), _read(sweep, "SWEEP")
    choices = [[(key, value) for value in values] for key, values in _lists(swept)]
    pairs = swept.get(_PAIRED, [{}])
    if not isinstance(pairs, list) or not all(isinstance(x, dict) for x in pairs):
        raise ValueError(
            f"SWEEP: {_PAIRED}: {shown(pairs)} is not a list of settings that belong "
            "together; write for example _: [{learning_rate: 1e-3, num_epochs: 2}]"
        )
    combinations = [
        {**dict(choice), **pair} for *choice, pair in product(*choices, pairs)
    ]
    if not any(combinations):
        raise ValueError(
            f"SWEEP: {sweep!r} names no setting; write for example\n"
            "learning_rate: [5e-4, 1e-3]\nloreft.positions: [l7, f7+l7]"
        )
    out = Path(base.get("output_dir") or _OUTPUT_DIR)
    varying = _varying(combinations)
    runs = []
    for settings, name in zip(combinations, _names(combinations, varying), strict=True):
        whole = deepcopy(base)
        # Whole blocks come before keys within them.
        for key in sorted(settings, key=lambda key: key.count(".")):
            set_nested(whole, key, deepcopy(settings[key]))
        whole["output_dir"] = str(out / name)
        # It records what a run was given and gave, whatever the adapter.
        if PLUGIN not in (plugins := whole.get("plugins") or []):
            whole["plugins"] = [*plugins, PLUGIN]
        runs.append(SweptRun(settings, varying, whole))
    return runs


def _read(path: str, argument: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{argument}: {path!r} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{argument}: {path!r} holds no settings, but {shown(found)}")
    return found


def _lists(swept: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each swept key, nested ones with dots, and the values to try."""
    for name, values in swept.items():
        key = f"{prefix}{name}"
        if key == _PAIRED:
            continue
        if key == "output_dir":
            raise ValueError(
                "SWEEP: output_dir: each run has a directory below the config's "
                "output_dir, named by its settings; set it there"
            )
        if isinstance(values, dict):
            yield from _lists(values, f"{key}.")
        elif isinstance(values, list) and values:
            yield key, values
        else:
            remedy = f"{key}: [{values}]" if values != [] else "at least one"
            raise ValueError(
                f"SWEEP: {key}: {shown(values)} is not a list of values to try; write "
                f"{remedy}"
            )


def _varying(combinations: list[dict[str, Any]]) -> list[str]:
    """Return the keys that not every combination has alike."""
    keys = dict.fromkeys(key for combination in combinations for key in combination)
    return [
        key
        for key in keys
        if any(c.get(key, ...) != combinations[0].get(key, ...) for c in combinations)
    ]


def _names(combinations: list[dict[str, Any]], varying: list[str]) -> list[str]:
    """Name a directory for each combination, by the settings that vary."""
    keys = varying or list(combinations[0])
    leaves = [key.rpartition(".")[2] for key in keys]
    labels = {
        key: leaf if leaves.count(leaf) == 1 else key
        for key, leaf in zip(keys, leaves, strict=True)
    }
    names: dict[str, str] = {}
    for combination in combinations:
        parts = [
            f"{labels[key]}={_value(combination[key])}"
            for key in keys
            if key in combination
        ]
        name, whole = ",".join(parts), json.dumps(combination, sort_keys=True)
        if whole in names:
            raise ValueError(f"SWEEP: two runs have the same settings: {name}")
        if name in names.values() or len(name) > _LONGEST_NAME:
            name = f"{name[:_LONGEST_NAME]}~{_digest(whole)}"
        names[whole] = name
    return list(names.values())


def _value(value: Any) -> str:
    """Write a value so that it can be part of a path."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = re.sub(r"[^\w.+-]+", "-", text).strip("-")
    if len(text) > _LONGEST_VALUE:
        text = f"{text[:_LONGEST_VALUE]}~{_digest(text)}"
    return text


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:8]
