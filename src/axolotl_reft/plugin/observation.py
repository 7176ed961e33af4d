"""What a user sees of the edits while axolotl trains."""

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


def callbacks(cfg: DictDefault, trainer: Any) -> list[TrainerCallback]:
    """The trainer's callbacks for a LoReFT adapter; ``loreft_log_edits`` can be off."""
    if cfg.adapter != "loreft" or cfg.loreft_log_edits is False:
        return []
    if not hasattr(trainer.model, "peft_config"):
        return []
    found: list[TrainerCallback] = [EditLog(trainer)]
    tokenizer = getattr(trainer, "processing_class", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if hasattr(tokenizer, "decode"):
        found.append(FirstBatch(trainer.model, tokenizer, _tell))
    return found


def _tell(text: str) -> None:
    """On lines of its own: not behind what a progress bar has written of its line."""
    with tqdm.external_write_mode():
        if not sys.stderr.isatty():
            # In a file a bar cannot be wiped away.
            print(file=sys.stderr, flush=True)
        LOG.info("%s", text)
