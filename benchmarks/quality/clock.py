"""The wall time of a trainer's steps, in every environment."""

from time import perf_counter
from typing import Any

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Measures the wall time of each step."""

    def __init__(self) -> None:
        self.seconds = list[float]()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(perf_counter() - self._start)
