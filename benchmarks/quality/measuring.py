"""The runs of a comparison, of which only those that are missing are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import Results, Run
from benchmarks.quality.training import Training, generate, train
from examples.real.answers import accuracy
from examples.real.tasks import Conversation, Task


@dataclass
class Measurement:
    """Trainings of one base.

    Attributes:
        results: settings, and the runs that are there.
        path: where the results are written after each run.
        tasks: returns the task of a name.
        pyreft: interpreter of its environment.
    """

    results: Results
    path: Path
    base: Any
    tokenizer: Any
    tasks: Callable[[str], Task]
    pyreft: str | None = None

    def run(self, names: Sequence[str], methods: Iterable[str], seeds: int) -> None:
        """Train each method on each task with all its learning rates and the first
        seed, then with the best rate and the others."""
        for name in names:
            if name not in self.results.base:
                task = self.tasks(name)
                score = self._accuracy(self.base, task, task.test)
                self.results.base[name] = score
                self.results.write(self.path)
        for method in methods:
            for name in names:
                if reason := self._reason_to_leave_out(name, method):
                    print(f"{method} is left out of {name}: {reason}")
                    continue
                for learning_rate in METHODS[method].learning_rates:
                    self._ensure(name, method, learning_rate, 0)
                chosen = self.results.of(name, method)[0].learning_rate
                for seed in range(1, seeds):
                    self._ensure(name, method, chosen, seed)

    def _reason_to_leave_out(self, name: str, method: str) -> str | None:
        if not METHODS[method].by_pyreft:
            return None
        if self.pyreft is None:
            return (
                "pyreft has no environment here; make bench-environments makes it, and "
                "--pyreft-python names another"
            )
        if len(self.tasks(name).test[0]) > 1:
            return "pyreft trains on one prompt a sample, and these have several turns"
        return None

    def _ensure(self, name: str, method: str, learning_rate: float, seed: int) -> None:
        if self.results.find(name, method, learning_rate, seed):
            return
        task, settings = self.tasks(name), self.results.settings
        training = Training(
            METHODS[method],
            learning_rate,
            seed,
            settings["steps"],
            settings["batch"],
            self.pyreft,
        )
        trained = train(self.base, self.tokenizer, task, training)
        model = trained.model
        validation = test = None
        best = [run.validation or 0 for run in self.results.of(name, method)[:1]]
        if not seed:
            validation = self._accuracy(model, task, task.validation)
        if validation is None or not best or validation > best[0]:
            test = self._accuracy(model, task, task.test)
        run = Run(
            name,
            method,
            learning_rate,
            seed,
            trained.parameters,
            validation,
            test,
            trained.cpu_seconds,
            trained.losses,
        )
        model.unload()
        self.results.runs.append(run)
        self.results.write(self.path)
        print(run, flush=True)

    def _accuracy(self, model: Any, task: Task, of: Sequence[Conversation]) -> float:
        return accuracy(model, self.tokenizer, task, of, generate=generate)
