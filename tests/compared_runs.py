"""Directories as trainings leave them, without training."""

import json
import shutil
from pathlib import Path

import torch
from conftest import build_adapter, build_model
from peft import LoraConfig, get_peft_model

from axolotl_reft.training.run_record import CONFIG_RECORD, SWEEP_RECORD

STATE = "trainer_state.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = {
    "base_model": "base",
    "adapter": "loreft",
    "loreft": {"positions": "f2+l3", "rank": 4, "frozen_prompt": "auto"},
    "datasets": [{"path": "train.jsonl"}],
    "learning_rate": "1e-3",
    "output_dir": "somewhere",
}


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def save_loreft(out: Path, seed: int = 1, **settings: object) -> Path:
    settings = {"positions": "f2+l3", "rank": 4} | settings
    build_adapter(build_model(), seed=seed, **settings).save_pretrained(out)
    return out


def save_lora(out: Path, rank: int = 2, **settings: object) -> Path:
    torch.manual_seed(0)
    targets = {"target_modules": ["v_proj", "q_proj"]} | settings
    config = LoraConfig(r=rank, task_type="CAUSAL_LM", **targets)
    model = get_peft_model(build_model(), config)
    model.save_pretrained(out, save_embedding_layers=True)
    return out


def write_state(
    out: Path, steps: int, of: int | None = None, scale: float = 1.0, **last: object
) -> None:
    """A state with a loss at every step, an evaluation at every second."""
    history: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        size = {f"loreft/edit_size/layer_{n}": 0.1 * step * (n + 1) for n in (0, 1)}
        history.append({"step": step, "loss": scale * (20 - step), **size})
        if step % 2 == 0:
            loss = scale * (10 - step)
            history.append({"step": step, "eval_loss": loss, "eval_ppl": 2 * loss})
    history[-1] |= last
    state = {"global_step": steps, "max_steps": of or steps, "log_history": history}
    write_json(out / STATE, state)


def finish(out: Path, steps: int = 4, scale: float = 1.0, **config: object) -> Path:
    """What a finished training leaves beside its adapter."""
    write_state(out, steps, scale=scale)
    state = json.loads((out / STATE).read_text())
    state["log_history"].append({"step": steps, "train_runtime": 83.0})
    write_json(out / STATE, state)
    write_json(out / CONFIG_RECORD, CONFIG | {"output_dir": str(out)} | config)
    return out


def checkpoint(out: Path, step: int, of: int, adapter: Path | None = None) -> Path:
    """A checkpoint with the adapter of ``out``, or of another directory."""
    directory = out / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copy((adapter or out) / name, directory / name)
    write_state(directory, step, of)
    return directory


def swept(out: Path, state: str, **record: object) -> None:
    content = {"settings": {}, "config": CONFIG, "state": state}
    write_json(out / SWEEP_RECORD, content | record)
