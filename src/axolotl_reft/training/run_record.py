"""Keep what a training was given and what it gave, beside its adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

CONFIG_RECORD, SWEEP_RECORD = "reft_config.json", "reft_sweep.json"


class RunRecord(TrainerCallback):
    """Writes the settings when a training begins, the trainer's state when it ends.

    A trainer saves its state with checkpoints alone, before it knows the time taken. A
    training that is interrupted leaves no state: an earlier one is removed.

    Args:
        settings: the config as it was written, with the command line's options.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            out = Path(args.output_dir)
            out.mkdir(parents=True, exist_ok=True)
            (out / TRAINER_STATE_NAME).unlink(missing_ok=True)
            text = json.dumps(self._settings, indent=2, default=str)
            (out / CONFIG_RECORD).write_text(text)

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            state.save_to_json(str(Path(args.output_dir) / TRAINER_STATE_NAME))
