"""Read what trainings left in their directories. No model is loaded."""

from __future__ import annotations

import filecmp
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from axolotl_reft.compare.results import Run, read_history, read_lm_eval
from axolotl_reft.compare.settings import adapter_settings, training_settings
from axolotl_reft.inspect.facts import trained_parameters
from axolotl_reft.training.run_record import CONFIG_RECORD, SWEEP_RECORD
from axolotl_reft.tuner.trained_modules import WRAPPED_PARTS

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_NO_RESULTS = (CONFIG_NAME, CONFIG_RECORD, SWEEP_RECORD, TRAINER_STATE_NAME)


def find_runs(directories: Iterable[str]) -> list[Run]:
    """Read the runs in the directories and just below them; ValueError if a directory
    has none."""
    found: dict[Path, Run] = {}
    for name in directories:
        top = Path(name)
        below = sorted(p for p in top.glob("*/") if not _CHECKPOINT.fullmatch(p.name))
        runs = [path for path in (top, *below) if _is_run(path)]
        if not runs:
            got = "holds no adapter" if top.is_dir() else "is no directory"
            raise ValueError(
                f"DIR: {name!r} {got}; name the output_dir of a training, a "
                "checkpoint-N below it, or the directory that holds several of them"
            )
        for path in runs:
            found.setdefault(path.resolve(), read_run(path))
    return list(found.values())


def _is_run(path: Path) -> bool:
    names = (CONFIG_NAME, CONFIG_RECORD, SWEEP_RECORD)
    return any((path / name).is_file() for name in names) or any(
        (checkpoint / CONFIG_NAME).is_file() for checkpoint in _checkpoints(path)
    )


def _checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints, the newest last."""
    found = [p for p in path.glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def read_run(path: Path) -> Run:
    """Read one run; what cannot be read is in its notes."""
    run = Run(str(path))
    checkpoints = _checkpoints(path)
    weights = [p for p in (path, *checkpoints[::-1]) if _has_weights(p)]
    _read_settings(run, path, checkpoints)
    if weights:
        _read_weights(run, weights[0])
    state = next(filter(None, (_state(run, p) for p in (path, *checkpoints[::-1]))), {})
    if state:
        run.steps, of = state["global_step"], state["max_steps"]
        if _CHECKPOINT.fullmatch(path.name):
            run.state = f"checkpoint at {run.steps} of {of} steps"
        elif not _has_weights(path):
            run.state = f"unfinished: saved at {run.steps} of {of} steps"
        elif run.steps >= of:
            run.state = "finished"
        else:
            run.state = f"stopped at {run.steps} of {of} steps"
        read_history(run, state["log_history"], _saved_step(run, path, checkpoints))
    elif checkpoints or weights:
        run.notes.append(f"no {TRAINER_STATE_NAME}: losses and time are not known")
    _read_sweep(run, path)
    _read_scores(run, path)
    return run


def _has_weights(path: Path) -> bool:
    return (path / SAFETENSORS_WEIGHTS_NAME).is_file()


def _json(run: Run, path: Path) -> Any:
    """Return a file's content, or None where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        run.notes.append(f"{path.name} cannot be read: {error}")
        return None


def _state(run: Run, path: Path) -> dict[str, Any] | None:
    state = _json(run, path / TRAINER_STATE_NAME)
    needed = {"global_step", "max_steps", "log_history"}
    return state if isinstance(state, dict) and needed <= state.keys() else None


def _read_settings(run: Run, path: Path, checkpoints: list[Path]) -> None:
    places = [path, *checkpoints[::-1]]
    found = (_json(run, place / CONFIG_NAME) for place in places)
    config: dict[str, Any] = next(filter(None, found), {})
    run.adapter = adapter_settings(config)
    top = path.parent if _CHECKPOINT.fullmatch(path.name) else path
    written = _json(run, top / CONFIG_RECORD)
    if written is None:
        written = (_json(run, top / SWEEP_RECORD) or {}).get("config")
    run.as_written = written is not None
    if written is None:
        written = _logged_config(top / "debug.log")
    run.training = training_settings(written, run.adapter)
    if not written:
        run.notes.append("no record of its config: only the adapter's settings show")


def _logged_config(log: Path) -> dict[str, Any]:
    """Return the config that axolotl printed last, defaults included."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return {}
    for block in re.findall(r"config:\n(\{\n.*?\n\})", text, re.DOTALL)[::-1]:
        try:
            return json.loads(block)
        except ValueError:
            continue
    return {}


def _read_weights(run: Run, path: Path) -> None:
    file = path / SAFETENSORS_WEIGHTS_NAME
    run.bytes = file.stat().st_size
    try:
        if run.adapter.get("method") == "LOREFT":
            run.parameters = trained_parameters(str(path))
        else:
            whole = run.adapter.get("modules_to_save", "").split(", ")
            run.parameters = sum(_trained_sizes(file, whole))
    except (ValueError, SafetensorError) as error:
        run.notes.append(str(error))


def _trained_sizes(file: Path, whole: list[str]) -> Iterator[int]:
    """Yield the sizes of trained tensors: not of embeddings saved beside them, nor of
    a whole module under its wrapper's names too."""
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():
            wrapped = any(f".{part}." in key for part in WRAPPED_PARTS)
            is_whole = any(f".{name}." in key for name in whole) and not wrapped
            if "lora_" in key or is_whole:
                yield math.prod(tensors.get_slice(key).get_shape())


def _saved_step(run: Run, path: Path, checkpoints: list[Path]) -> int | None:
    """Return the step of the adapter in ``path``: that of the checkpoint with the same
    tensors, which is not the last where the best was loaded at the end."""
    if not _has_weights(path) or not any(map(_has_weights, checkpoints)):
        return run.steps
    name = SAFETENSORS_WEIGHTS_NAME
    for checkpoint in filter(_has_weights, checkpoints[::-1]):
        if filecmp.cmp(path / name, checkpoint / name, shallow=False):
            return _step(checkpoint)
    if _step(checkpoints[-1]) >= (run.steps or 0):
        run.notes.append(
            "the adapter equals no checkpoint; losses may be of another training"
        )
    return run.steps


def _read_sweep(run: Run, path: Path) -> None:
    record = _json(run, path / SWEEP_RECORD) or {}
    if record.get("state") == "failed":
        run.state = f"failed: {record.get('error')}"
    elif record.get("state") == "begun":
        saved = "" if run.steps is None else f": saved at {run.steps} steps"
        run.state = f"unfinished{saved}"


def _read_scores(run: Run, path: Path) -> None:
    """Read lm_eval's results, such as ``axolotl reft lm-eval --output`` writes."""
    weights = path / SAFETENSORS_WEIGHTS_NAME
    for file in sorted(path.glob("*.json")):
        if file.name in _NO_RESULTS:
            continue
        found = _json(run, file)
        if not isinstance(found, dict) or not isinstance(found.get("results"), dict):
            continue
        read_lm_eval(run, found)
        if weights.is_file() and file.stat().st_mtime < weights.stat().st_mtime:
            run.notes.append(f"{file.name} is older than the adapter")
