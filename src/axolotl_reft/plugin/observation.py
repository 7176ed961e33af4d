"""Callbacks that show the edits while axolotl trains."""

from __future__ import annotations

import sys
from typing import Any

from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from tqdm import tqdm
from transformers import TrainerCallback

from axolotl_reft.training.edit_log import EditLog
from axolotl_reft.training.first_batch import FirstBatch

LOG = get_logger(__name__)


def edit_callbacks(cfg: DictDefault, trainer: Any) -> list[TrainerCallback]:
    """The trainer's callbacks, none with ``loreft_log_edits: false``."""
    if cfg.adapter != "loreft" or cfg.loreft_log_edits is False:
        return []
    if not hasattr(trainer.model, "peft_config"):
        return []
    callbacks: list[TrainerCallback] = [EditLog(trainer)]
    tokenizer = getattr(trainer, "processing_class", None)
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
