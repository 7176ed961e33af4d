"""How an adapter was trained, by what lies beside it: the trainer's state, and the card
that axolotl writes its config into."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

# What of an axolotl config says how an adapter was trained.
_TRAINING_KEYS = (
    "datasets",
    "learning_rate",
    "lr_scheduler",
    "num_epochs",
    "max_steps",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "sequence_len",
    "sample_packing",
    "optimizer",
    "weight_decay",
    "warmup_ratio",
    "warmup_steps",
    "seed",
)


def training_record(directory: str) -> dict[str, Any]:
    """How it was trained, by the trainer's state and axolotl's model card."""
    here = Path(directory)
    if not here.is_dir():
        return {}
    facts: dict[str, Any] = {}
    states = [here / "trainer_state.json", *_by_step(here)]
    state_file = next((file for file in states if file.is_file()), None)
    if state_file:
        facts |= _from_state(state_file)
    for card in (here / "README.md", here.parent / "README.md"):
        settings = _from_card(card)
        if settings:
            facts["settings"] = settings
            break
    return facts


def _by_step(directory: Path) -> list[Path]:
    """The checkpoints' states, the last one first."""
    found = directory.glob("checkpoint-*/trainer_state.json")
    return sorted(found, key=lambda file: _number(file.parent.name), reverse=True)


def _number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _from_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text())
        history = state["log_history"]
    except (ValueError, KeyError, TypeError):
        return {}
    facts = {"steps": state.get("global_step"), "epochs": state.get("epoch")}
    for key in ("loss", "eval_loss"):
        values = [entry[key] for entry in history if key in entry]
        if values:
            facts[f"first_{key}"], facts[f"last_{key}"] = values[0], values[-1]
    return facts


def _from_card(card: Path) -> dict[str, Any]:
    """The settings in the axolotl config that axolotl writes into a model card."""
    if not card.is_file():
        return {}
    match = re.search(
        r"axolotl version: .*?```yaml\n(.*?)\n```", card.read_text(), re.DOTALL
    )
    try:
        config = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    if not isinstance(config, dict):
        return {}
    return {key: config[key] for key in _TRAINING_KEYS if key in config}
