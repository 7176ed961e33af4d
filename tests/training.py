"""axolotl's training within this process, from the validated config on; its reading of
data, which starts processes of its own, is passed over."""

import json
from pathlib import Path

# Else the first training imports it, after what conftest.py freezes.
import axolotl.core.builders  # noqa: F401
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.train import train as axolotl_train
from datasets import Dataset
from workspace import build_tokenizer

from axolotl_reft.plugin.plugin import LoreftPlugin


def read_data(file: Path) -> Dataset:
    """The samples as axolotl tokenizes them: a prompt, its answer, and the end."""
    tokenizer = build_tokenizer()
    rows = []
    for line in file.read_text().splitlines():
        sample = json.loads(line)
        prompt = tokenizer(sample["instruction"]).input_ids
        answer = tokenizer(sample["output"], add_special_tokens=False).input_ids + [2]
        ids = prompt + answer
        labels = [-100] * len(prompt) + answer
        rows.append(
            {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
        )
    return Dataset.from_list(rows)


def train(config: Path, steps: int = 12, evaluates: bool = False, **changes: object):
    """Train for so many steps; returns the model and the losses of the steps, those of
    evaluations among them."""
    defaults: dict[str, object] = {"max_steps": steps, "num_epochs": 1}
    defaults |= {} if evaluates else {"test_datasets": None}
    cfg = load_cfg(str(config), **defaults | changes)
    LoreftPlugin().load_datasets(cfg)
    tests = read_data(config.parent / "test.jsonl") if evaluates else None
    data = TrainDatasetMeta(read_data(config.parent / "train.jsonl"), tests, steps)
    model, _, trainer = axolotl_train(cfg=cfg, dataset_meta=data)
    losses = [
        entry[name]
        for entry in trainer.state.log_history
        for name in ("loss", "eval_loss")
        if name in entry
    ]
    return model, losses
