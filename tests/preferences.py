"""Trainers of every ``rl:`` method, built by axolotl itself from a tiny workspace."""

import json
import random
import string
from pathlib import Path

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.train import setup_model_and_trainer
from workspace import build_base, build_config

# Of the methods that TRL trains on pairs, one by one, and by itself.
PAIRED = ("dpo", "ipo", "orpo", "simpo")
METHODS = (*PAIRED, "kto", "grpo")

POSITIONS = {"positions": "f2+l3", "rank": 4, "tied_weights": False}


def rewards_m(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """How many of the letters that were generated are m."""
    return [completion.count("m") / 4 for completion in completions]


def rewards_length(prompts: list[str], completions: list[str], **_: object) -> list:
    """The longer, the better."""
    return [float(len(completion)) for completion in completions]


def build_preferences(file: Path, method: str, count: int, seed: int = 0) -> None:
    """Prompts and answers of ragged lengths; chosen answers are of m, others of n."""
    rng = random.Random(seed)
    with file.open("w") as out:
        for number in range(count):
            letters = rng.sample(string.ascii_lowercase[:12], rng.randint(3, 9))
            row: dict[str, object] = {"prompt": " ".join(letters) + " :"}
            answers = [" " + " ".join(c * rng.randint(1, 4)) for c in "mn"]
            if method in PAIRED:
                row |= dict(zip(("chosen", "rejected"), answers, strict=True))
            elif method == "kto":
                label = number % 2 == 0
                row |= {"completion": answers[0 if label else 1], "label": label}
            out.write(json.dumps(row) + "\n")


def build_preference_workspace(
    directory: Path, method: str, count: int = 16, **changes: object
) -> Path:
    """A base, data and a config for ``rl: method``."""
    if not (directory / "base").exists():
        build_base(directory / "base")
    build_preferences(directory / f"{method}.jsonl", method, count)
    source = {
        "path": str(directory / f"{method}.jsonl"),
        "ds_type": "json",
        "split": "train",
        "type": None,
    }
    settings: dict[str, object] = {
        "rl": method,
        "rl_beta": 0.5,
        "loreft": POSITIONS,
        "datasets": [source],
        "test_datasets": None,
        "dataset_prepared_path": str(directory / f"prepared-{method}"),
        "output_dir": str(directory / f"out-{method}"),
        "dataset_num_proc": 1,
        "remove_unused_columns": False,
        "num_epochs": 1,
        "save_steps": 1000,
    }
    if method == "simpo":
        settings["simpo_gamma"] = 0.5
    if method == "grpo":
        settings["micro_batch_size"] = 8
        settings["trl"] = {
            "num_generations": 4,
            "max_completion_length": 4,
            "reward_funcs": ["preferences.rewards_m", "preferences.rewards_length"],
            "multi_objective_aggregation": "normalize_then_sum",
            "beta": 0.04,
        }
    return build_config(directory, f"{method}.yml", **settings | changes)


def build_trainer(config: Path, **changes: object) -> object:
    """The trainer as `axolotl train` builds it."""
    cfg = load_cfg(str(config), **changes)
    cfg.dataset_num_proc = None  # in this process
    data = load_preference_datasets(cfg=cfg, cli_args=None)
    return setup_model_and_trainer(cfg, data)[0]
