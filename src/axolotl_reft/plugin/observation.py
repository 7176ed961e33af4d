"""Callbacks that show the edits while axolotl trains."""

from __future__ import annotations

import sys

from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from axolotl_reft.training.edit_log import EditLog
from axolotl_reft.training.first_batch import FirstBatch

LOG = get_logger(__name__)


def edit_callbacks(cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
    """Return the trainer's callbacks, none with ``loreft_log_edits: false``."""
    adapted = cfg.adapter == "loreft" and hasattr(trainer.model, "peft_config")
    if not adapted or cfg.loreft_log_edits is False:
        return []
    callbacks: list[TrainerCallback] = [EditLog(trainer)]
    # A processor holds its tokenizer.
    tokenizer = trainer.processing_class
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if hasattr(tokenizer, "decode"):
        callbacks.append(FirstBatch(trainer.model, tokenizer, _log))
    return callbacks


def _log(text: str) -> None:
    """Log on a new line, not behind a progress bar."""
    with tqdm.external_write_mode():
        if not sys.stderr.isatty():
            # In a file the bar cannot be cleared.
            print(file=sys.stderr, flush=True)
        LOG.info("%s", text)
