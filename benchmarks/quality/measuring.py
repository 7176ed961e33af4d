"""The runs of a comparison, of which only those that are missing are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import Results, Run
from benchmarks.quality.training import Training, train
from examples.real.answers import accuracy
from examples.real.tasks import Task


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

    def run(self, names: Sequence[str], methods: Iterable[str], seeds: int) -> None:
        """Train each method on each task with all its learning rates and the first
        seed, then with the best rate and the others."""
        for name in names:
            if name not in self.results.base:
                task = self.tasks(name)
                score = accuracy(self.base, self.tokenizer, task, task.test)
                self.results.base[name] = score
                self.results.write(self.path)
        for method in methods:
            for name in names:
                for learning_rate in METHODS[method].learning_rates:
                    self._ensure(name, method, learning_rate, 0)
                chosen = self.results.of(name, method)[0].learning_rate
                for seed in range(1, seeds):
                    self._ensure(name, method, chosen, seed)

    def _ensure(self, name: str, method: str, learning_rate: float, seed: int) -> None:
        if self.results.find(name, method, learning_rate, seed):
            return
        task, settings = self.tasks(name), self.results.settings
        training = Training(
            METHODS[method], learning_rate, seed, settings["steps"], settings["batch"]
        )
        trained = train(self.base, self.tokenizer, task, training)
        model = trained.model
        validation = test = None
        best = [run.validation or 0 for run in self.results.of(name, method)[:1]]
        if not seed:
            validation = accuracy(model, self.tokenizer, task, task.validation)
        if validation is None or not best or validation > best[0]:
            test = accuracy(model, self.tokenizer, task, task.test)
        run = Run(
            name,
            method,
            learning_rate,
            seed,
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            validation,
            test,
            trained.cpu_seconds,
            trained.losses,
        )
        self.base = model.unload()
        self.results.runs.append(run)
        self.results.write(self.path)
        print(run, flush=True)
