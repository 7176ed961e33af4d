"""What trainings gave: a JSON file that grows run by run, and its table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import table
from benchmarks.harness import hardware, now, versions


@dataclass(frozen=True)
class Run:
    """One training and its scores.

    Attributes:
        validation: right answers in % of those to choose a learning rate by; None
            where there was no choice.
        test: right answers in % of those that nothing was chosen by; None where an
            earlier learning rate was better in validation.
        seconds: of CPU time in training.
        losses: step by step.
    """

    task: str
    method: str
    learning_rate: float
    seed: int
    parameters: int
    validation: float | None
    test: float | None
    seconds: float
    losses: list[float]


@dataclass
class Results:
    """All runs with one model and one set of settings.

    Attributes:
        settings: common to all runs.
        base: right answers in % without an adapter, by task.
    """

    settings: dict[str, Any]
    base: dict[str, float] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(run.method for run in self.runs))

    def of(self, task: str, method: str) -> list[Run]:
        """Return the runs with the learning rate that was best in validation, of equals
        the first, by seed."""
        wanted = (task, method)
        runs = [run for run in self.runs if (run.task, run.method) == wanted]
        runs.sort(key=lambda run: run.seed)
        tried = [run for run in runs if run.seed == runs[0].seed]
        best = max(tried, key=lambda run: run.validation or 0, default=None)
        return [r for r in runs if best and r.learning_rate == best.learning_rate]

    def find(
        self, task: str, method: str, learning_rate: float, seed: int
    ) -> Run | None:
        wanted = (task, method, learning_rate, seed)
        for run in self.runs:
            if (run.task, run.method, run.learning_rate, run.seed) == wanted:
                return run
        return None

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"versions": versions(), "hardware": hardware(), "date": now()}
        path.write_text(json.dumps({**asdict(self), **about}, indent=1) + "\n")


def read(path: Path, settings: dict[str, Any]) -> Results:
    """Read the results that a file has, none if it is missing.

    Raises:
        ValueError: they were made with other settings.
    """
    if not path.exists():
        return Results(settings)
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        different = [n for n in settings if settings[n] != found["settings"].get(n)]
        raise ValueError(
            f"{path} has results with another {', '.join(different)}; name another "
            "file by --results, or delete this one"
        )
    return Results(settings, found["base"], [Run(**run) for run in found["runs"]])


def report(results: Results) -> str:
    """Return a table of test scores: their mean, and every seed's."""
    header = ["task", "method", "parameters", "learning rate", "mean, %"]
    header += ["least to most", "by seed", "CPU s a step"]
    lines = [table.row(header), table.row(["---"] * len(header))]
    for task, score in results.base.items():
        lines.append(table.row([task, "none", "", "", f"{score:.1f}", "", "", ""]))
        for method in results.methods:
            if runs := results.of(task, method):
                lines.append(table.row([task, method, *_cells(runs)]))
    return "\n".join([*lines, ""])


def _cells(runs: Sequence[Run]) -> list[str]:
    scores = [run.test for run in runs if run.test is not None]
    return [
        f"{runs[0].parameters:,}",
        f"{runs[0].learning_rate:g}",
        f"{mean(scores):.1f}",
        f"{min(scores):.1f} to {max(scores):.1f}",
        ", ".join(f"{score:.1f}" for score in scores),
        f"{mean(run.seconds / len(run.losses) for run in runs):.2f}",
    ]
