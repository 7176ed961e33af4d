"""Bases and adapters that are served, built once, below ``build/serving``."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.base import Setting, build_base
from examples.real.models import smollm2

KEPT = Path("build/serving")
# By the names of the tables: settings of LoReFT.
LOREFT: dict[str, dict[str, Any]] = {
    "f7+l7": {"positions": "f7+l7", "rank": 4},
    "l7": {"positions": "l7", "rank": 4},
    "another l7": {"positions": "l7", "rank": 4},
    "all": {"positions": "all", "rank": 2},
}
TOY = Setting(hidden_size=64, layers=2, rank=2, vocabulary=64)
TINY = Setting(hidden_size=512, layers=8)


def base(name: str, kept: Path = KEPT) -> Path:
    """Return the directory of ``toy``, ``tiny``, ``smollm2`` or a model's own."""
    if name not in ("toy", "tiny", "smollm2"):
        if not (Path(name) / "config.json").exists():
            raise ValueError(
                f"{name!r} holds no config.json; name a model's directory, tiny or "
                "smollm2"
            )
        return Path(name)
    if name == "smollm2":
        return smollm2()
    directory = kept.resolve() / name
    if not directory.exists():
        kept.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=kept) as made:
            model: Any = build_base(TINY if name == "tiny" else TOY)
            model.save_pretrained(made)
            shutil.copytree(made, directory)
    return directory


def adapters(base: Path, kept: Path = KEPT) -> dict[str, Path]:
    """Return directories of the adapters of ``LOREFT`` and of ``LoRA``, with random
    parameters, for a base."""
    of_base = kept.resolve() / "-".join(["adapters", *base.resolve().parts[1:]])
    found = {name: of_base / name for name in (*LOREFT, "LoRA")}
    if not all(directory.exists() for directory in found.values()):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from axolotl_reft import LoreftConfig

        model = AutoModelForCausalLM.from_pretrained(base)
        lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        configs = {name: LoreftConfig(**LOREFT[name]) for name in LOREFT}
        for seed, (name, config) in enumerate({**configs, "LoRA": lora}.items()):
            torch.manual_seed(seed)
            config.task_type = "CAUSAL_LM"
            adapted = get_peft_model(model, config)
            adapted.save_pretrained(found[name])
            model = adapted.unload()
    return found
