"""The runs of a comparison, of which only those that are missing are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.results import Results, Run
from benchmarks.quality.tasks import Task
from benchmarks.quality.training import Training, accuracy, train


@dataclass
class Measurement:
    """Trainings of one base.

    Attributes:
        results: settings, and the runs that are there.
        path: where the results are written after each run.
        tasks: returns the task of a name.
    """

    results: Results
    path: Path
    base: Any
    tokenizer: Any
    tasks: Callable[[str], Task]

    def run(
        self,
        names: Sequence[str],
        positions: Iterable[str],
        learning_rates: Sequence[float],
        seeds: int,
    ) -> None:
        """Train on each task at all positions, with every learning rate and the first
        seed, then with the best rate and the others."""
        for name in names:
            if name not in self.results.base:
                task = self.tasks(name)
                score = accuracy(self.base, self.tokenizer, task, task.test)
                self.results.base[name] = score
                self.results.write(self.path)
        choosing = len(learning_rates) > 1
        for where in positions:
            for name in names:
                for learning_rate in learning_rates:
                    self._ensure(name, where, learning_rate, 0, choosing)
        for where in positions:
            for seed in range(1, seeds):
                for name in names:
                    chosen = self.results.of(name, where)[0].learning_rate
                    self._ensure(name, where, chosen, seed)

    def _ensure(
        self,
        name: str,
        positions: str,
        learning_rate: float,
        seed: int,
        validate: bool = False,
    ) -> None:
        if self.results.find(name, positions, learning_rate, seed):
            return
        task, settings = self.tasks(name), self.results.settings
        loreft = {"positions": positions, "rank": settings["rank"]}
        training = Training(
            loreft, learning_rate, seed, settings["steps"], settings["batch"]
        )
        model, seconds = train(self.base, self.tokenizer, task, training)
        validation = None
        if validate:
            validation = accuracy(model, self.tokenizer, task, task.validation)
        run = Run(
            name,
            positions,
            learning_rate,
            seed,
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            validation,
            accuracy(model, self.tokenizer, task, task.test),
            seconds,
            seconds / training.steps,
        )
        self.base = model.unload()
        self.results.runs.append(run)
        self.results.write(self.path)
        print(run, flush=True)
