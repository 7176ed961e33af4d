"""What a training gave: numbers from a trainer's log, and lm_eval's results."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LAST = 10
# Of the trainer's evaluations, beside its metrics.
_NO_SCORES = ("eval_loss", "eval_runtime", "_per_second")
_RESUMES = ("resume_from_checkpoint", "auto_resume_from_checkpoints")


@dataclass
class Run:
    """What one training gave.

    Attributes:
        state: finished, or what it is instead.
        adapter, training: settings of the adapter's file, and of axolotl's config.
        as_written: whether ``training`` has what was written alone, without defaults.
        loss, mean_loss: at the last logged step, and of the last 10 logged ones.
        eval_loss, best_eval_loss: the saved adapter's, and the lowest of any step's.
        scores: other metrics of evaluations, and results of lm_eval's files.
        lower_is_better: those of them.
        edit_size: mean of ‖Φ(h)−h‖/‖h‖ over the logged groups of layers.
        curves: loss and eval_loss by step.
        notes: what a reader of the numbers must know.
    """

    directory: str
    state: str = "no trainer state"
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    as_written: bool = False
    parameters: int | None = None
    bytes: int | None = None
    steps: int | None = None
    loss: float | None = None
    mean_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    lower_is_better: set[str] = field(default_factory=set)
    edit_size: float | None = None
    seconds: float | None = None
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        return self.adapter | self.training


def read_history(run: Run, history: list[dict[str, Any]], saved: int | None) -> None:
    """Read losses, edit sizes and scores up to the step of the saved adapter, and the
    time."""
    if saved is not None and run.steps is not None and saved < run.steps:
        run.notes.append(f"the saved adapter is that of step {saved} of {run.steps}")
    last_step = math.inf if saved is None else saved
    until = [entry for entry in history if entry.get("step", 0) <= last_step]
    for name in ("loss", "eval_loss"):
        run.curves[name] = {e["step"]: e[name] for e in history if name in e}
    losses = [entry["loss"] for entry in until if "loss" in entry]
    if losses:
        last = losses[-LAST:]
        run.loss, run.mean_loss = losses[-1], sum(last) / len(last)
        if not math.isfinite(losses[-1]):
            run.notes.append("the training loss is no number: the training diverged")
    sizes = [found for entry in until if (found := _edit_sizes(entry))]
    if sizes:
        run.edit_size = sum(sizes[-1]) / len(sizes[-1])
    evaluations = [entry for entry in until if "eval_loss" in entry]
    if evaluations:
        _read_evaluation(run, evaluations[-1], saved)
    times = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    run.seconds = times[-1] if times else None
    if times and any(run.training.get(key) for key in _RESUMES):
        run.notes.append("the time is that since it was resumed, if it was")


def _edit_sizes(entry: Mapping[str, Any]) -> list[float]:
    return [v for k, v in entry.items() if k.startswith("loreft/edit_size/")]


def _read_evaluation(run: Run, entry: Mapping[str, Any], saved: int | None) -> None:
    run.eval_loss = entry["eval_loss"]
    run.best_eval_loss = min(run.curves["eval_loss"].values())
    if saved is not None and entry["step"] < saved:
        run.notes.append(f"eval_loss is of step {entry['step']} of {saved}")
    for key, value in entry.items():
        if key.startswith("eval_") and not key.endswith(_NO_SCORES):
            run.scores[key] = value
            if re.search("loss|ppl|perplexity", key):
                run.lower_is_better.add(key)


def read_lm_eval(run: Run, found: Mapping[str, Any]) -> None:
    """Read the results of lm_eval."""
    directions = found.get("higher_is_better") or {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr"):
                continue
            kind = "" if filtered in ("", "none") else f" ({filtered})"
            name = f"{task} {metric}{kind}"
            if metric != "sample_len":
                run.scores[name] = value
            if (directions.get(task) or {}).get(metric) is False:
                run.lower_is_better.add(name)
