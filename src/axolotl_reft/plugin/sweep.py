"""``axolotl reft sweep``: train with every combination of settings."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten
from time import monotonic
from typing import Any

import torch
import transformers.modelcard
import yaml
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg, prepare_plugins
from axolotl.cli.train import do_train
from axolotl.cli.utils.train import launch_training
from axolotl.integrations.config import merge_input_args
from axolotl.utils.dict import DictDefault
from axolotl.utils.tee import close_debug_log
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME

from axolotl_reft.compare.command import show
from axolotl_reft.errors import did_you_mean, shown
from axolotl_reft.plugin.kept_base import keep_base
from axolotl_reft.plugin.sweep_file import SweptRun, read_sweep
from axolotl_reft.training.run_record import SWEEP_RECORD

CONFIG = "config.yml"
# Settings of the adapter, the optimizer and the length of a training. Others may make
# axolotl replace functions of transformers or torch, for the rest of a process.
ONE_PROCESS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "cosine_min_lr_ratio",
    "gradient_accumulation_steps", "learning_rate", "lora_alpha", "lora_r", "loreft",
    "lr_scheduler", "max_grad_norm", "max_steps", "micro_batch_size", "num_epochs",
    "seed", "warmup_ratio", "warmup_steps", "weight_decay",
)  # fmt: skip


def run_sweep(config: str, sweep: str, launcher: str = "python") -> list[Path]:
    """Train every run of a sweep that has not finished, and compare them.

    Args:
        config, sweep: files, the second as axolotl's ``--sweep`` takes it.
        launcher: python trains in this process where only ``ONE_PROCESS`` is swept, so
            that the base loads once; otherwise each run has a process of its own.

    Returns:
        the directories.

    Raises:
        ValueError: a file or a setting is wrong, before anything is trained; or some
            of the runs failed, after the others are trained.
    """
    runs = read_sweep(config, sweep)
    waiting = [run for run in runs if not is_finished(run)]
    check(waiting)
    keys = {key for run in runs for key in run.varying}
    outside = sorted(key for key in keys if key.split(".")[0] not in ONE_PROCESS)
    together = launcher == "python" and not outside
    how = "one process, the base loaded once" if together else "a process each"
    if launcher == "python" and outside:
        how += f", since {', '.join(outside)} may change the process"
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before; {how}")
    if not any(is_evaluated(run.config) for run in runs):
        print(
            "No run is evaluated, so that they are sorted by the training loss. With "
            "test_datasets or val_set_size, set eval_steps."
        )
    failed = []
    with _uncollected(), keep_base() if together else nullcontext():
        for run in waiting:
            number = f"run {runs.index(run) + 1} of {len(runs)}: {run.directory.name}"
            print(number, flush=True)
            began = monotonic()
            try:
                _train(run, train_here if together else _start(launcher))
                print(f"{number}: {monotonic() - began:.0f} s", flush=True)
            except KeyboardInterrupt:
                print("interrupted; the same command goes on", file=sys.stderr)
                raise
            except Exception as error:
                failed.append(run)
                print(f"{number} failed: {_reason(error)}", file=sys.stderr, flush=True)
    directories = [run.directory for run in runs]
    show([str(directory) for directory in directories])
    if failed:
        names = "".join(f"\n{run.directory}" for run in failed)
        raise ValueError(
            f"{len(failed)} of {len(runs)} runs failed; {SWEEP_RECORD} in each has its "
            f"error, and the same command tries them again:{names}"
        )
    return directories


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep what there is from garbage collection: axolotl collects five times a
    training, which takes longer than a short one."""
    gc.freeze()
    try:
        yield
    finally:
        # Else the process ends with it, and triton's bindings report leaks.
        gc.unfreeze()


def is_evaluated(config: dict[str, Any]) -> bool:
    """Return whether axolotl evaluates in a training: not by held-out data alone."""
    data = "test_datasets", "val_set_size"
    when = map(config.get, ("eval_steps", "evals_per_epoch", "eval_strategy"))
    return any(map(config.get, data)) and any(v and v != "no" for v in when)


def is_finished(run: SweptRun) -> bool:
    """Return whether a run was trained before; ValueError if with another config."""
    path = run.directory / SWEEP_RECORD
    if not path.is_file():
        return False
    record = json.loads(path.read_text())
    before, now = record["config"], json.loads(json.dumps(run.config, default=str))
    if record["state"] != "finished" or before == now:
        return record["state"] == "finished"
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    told = ", ".join(f"{k}: {shown(before.get(k))}" for k in changed)
    raise ValueError(
        f"output_dir: {str(run.directory)!r} holds a run with other settings ({told}); "
        "set another output_dir in the config, or remove it"
    )


def check(runs: list[SweptRun]) -> None:
    """Raise ValueError for what axolotl would drop, or our plugin refuses."""
    for run in runs:
        prepare_plugins(DictDefault(run.config))
    known = tuple(merge_input_args()[0].model_fields)
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        # Blocks of axolotl's own may hold more than its schema names.
        if (name := key.split(".")[0]) not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"SWEEP: {key}: axolotl has no setting {name!r}.{hint}")


def _train(run: SweptRun, train: Callable[[Path], None]) -> None:
    """Train a run, and record how it went."""
    run.directory.mkdir(parents=True, exist_ok=True)
    path = run.directory / CONFIG
    path.write_text(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
    record = {"settings": run.settings, "config": run.config, "state": "begun"}
    try:
        _write(run, record)
        train(path)
        if not (run.directory / TRAINER_STATE_NAME).is_file():
            raise RuntimeError("the training was stopped before its end")
        record["state"] = "finished"
    except Exception as error:
        record |= {"state": "failed", "error": _reason(error)}
        record["traceback"] = traceback.format_exc()
        raise
    finally:
        _write(run, record)


def _write(run: SweptRun, record: dict[str, Any]) -> None:
    path = run.directory / SWEEP_RECORD
    # At once: an interruption must not leave half of it.
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(record, indent=2, default=str))
    whole.replace(path)


def _reason(error: Exception) -> str:
    # Validation's first line says no more than that it failed.
    return f"{type(error).__name__}: {shorten(str(error), 300, placeholder=' …')}"


def train_here(config: Path) -> None:
    """Train in this process, and leave it as it was."""
    with _process_kept():
        cfg = load_cfg(str(config))
        # As in a process of its own: what some adapters begin with depends on it.
        set_seed(42 if cfg.seed is None else cfg.seed)
        try:
            do_train(cfg, TrainerCliArgs())
        except SystemExit as stop:
            # How axolotl ends on Ctrl-C, with success.
            raise KeyboardInterrupt from stop


@contextmanager
def _process_kept() -> Iterator[None]:
    """Undo what a training leaves in its process."""
    comment = transformers.modelcard.AUTOGENERATED_TRAINER_COMMENT
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        # axolotl adds the config to every later model card, saves the model when it is
        # interrupted, and goes on with the first log.
        transformers.modelcard.AUTOGENERATED_TRAINER_COMMENT = comment
        signal.signal(signal.SIGINT, handler)
        # Held meanwhile: it waits for itself when what it replaces is finalized.
        streams = sys.stdout, sys.stderr
        close_debug_log()
        del streams
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _start(launcher: str) -> Callable[[Path], None]:
    def train(config: Path) -> None:
        if launcher == "python":
            line = [sys.executable, "-m", "axolotl.cli.train", str(config)]
            subprocess.run(line, check=True)
        else:
            launch_training(str(config), launcher, None, {})

    return train
