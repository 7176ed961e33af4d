"""What methods cost: a step's time and memory, the adapter's bytes, and generation.

The methods take turns in one process. The memory of each is that of another process,
``python -m benchmarks.quality.costs METHOD BATCH``.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from benchmarks import table
from benchmarks.harness import hardware, middle_half, now, take_turns, versions
from benchmarks.quality.methods import METHODS
from benchmarks.quality.training import Training, base_of, train
from benchmarks.tasks import resident
from examples.real.answers import greedy, turns_of
from examples.real.tasks import Task, load

RESULTS = Path(__file__).parent / "costs.json"
TASK = "linguistic mappings"
FLOOR = "LoRA r8"
_STEPS, _ROWS, _TOKENS = 4, 20, 32


@dataclass(frozen=True)
class Cost:
    """What a method costs.

    Attributes:
        step_seconds: median of a training's steps but for the first, in each round.
        tokens_per_second: of greedy generation for 20 prompts at once, in each round.
        memory: bytes beyond the base, at the highest in a training.
        adapter: bytes of its file.
    """

    method: str
    parameters: int
    step_seconds: list[float]
    tokens_per_second: list[float]
    memory: int
    adapter: int


def measure(
    base: Any, tokenizer: Any, batch: int, rounds: int, methods: Collection[str]
) -> list[Cost]:
    """Let the methods and the floor take turns."""
    task, sizes = load(TASK, 200), dict[str, tuple[int, int]]()

    def turn(method: str) -> tuple[float, float]:
        training = Training(METHODS[method], 1e-3, 0, _STEPS, batch)
        trained = train(base, tokenizer, task, training)
        model = trained.model
        found = median(trained.step_seconds[1:]), _generate(model, tokenizer, task)
        with TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            size = (Path(directory) / "adapter_model.safetensors").stat().st_size
        sizes[method] = trained.parameters, size
        model.unload()
        return found

    # What pyreft trains is in another process.
    names = [
        name
        for name, method in METHODS.items()
        if (name in methods or name == FLOOR) and not method.by_pyreft
    ]
    values = take_turns({name: partial(turn, name) for name in names}, rounds)
    costs = list[Cost]()
    for name in names:
        steps, tokens = map(list, zip(*values[name], strict=True))
        parameters, size = sizes[name]
        memory = _memory_of(name, batch)
        costs.append(Cost(name, parameters, steps, tokens, memory, size))
    return costs


def write(costs: Sequence[Cost], path: Path = RESULTS) -> None:
    machine = hardware() | {"threads": torch.get_num_threads()}
    about = {"versions": versions(), "hardware": machine, "date": now()}
    content = {"costs": [asdict(cost) for cost in costs], **about}
    path.write_text(json.dumps(content, indent=1) + "\n")


def report(costs: Sequence[Cost]) -> str:
    """Return a table; times as medians of the rounds' ratios to the floor's."""
    header = ["method", "parameters", "step, s", f"step / {FLOOR}", "memory, MB"]
    header += ["adapter, kB", "tokens/s", f"tokens/s / {FLOOR}"]
    lines = [table.row(header), table.row(["---"] * len(header))]
    (slowest,) = (cost for cost in costs if cost.method == FLOOR)
    for cost in costs:
        steps = _ratios(cost.step_seconds, slowest.step_seconds)
        tokens = _ratios(cost.tokens_per_second, slowest.tokens_per_second)
        cells = [cost.method, f"{cost.parameters:,}"]
        cells += [f"{median(cost.step_seconds):.2f}", steps, f"{cost.memory / 1e6:.0f}"]
        cells += [f"{cost.adapter / 1e3:,.0f}"]
        cells += [f"{median(cost.tokens_per_second):.0f}", tokens]
        lines.append(table.row(cells))
    return "\n".join([*lines, ""])


def _ratios(own: Sequence[float], floor: Sequence[float]) -> str:
    middle, low, high = middle_half(a / b for a, b in zip(own, floor, strict=True))
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _generate(model: Any, tokenizer: Any, task: Task) -> float:
    """Return the tokens a second."""
    prompts = [turns_of(tokenizer, c)[0][0] for c in task.test[:_ROWS]]
    start = perf_counter()
    ids_BT = greedy(model, tokenizer, prompts, _TOKENS, fewest=_TOKENS)
    return ids_BT.numel() / (perf_counter() - start)


def _memory_of(method: str, batch: int) -> int:
    module = "benchmarks.quality.costs"
    done = subprocess.run(
        [sys.executable, "-m", module, method, str(batch)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(done.stdout.splitlines()[-1])


def _memory(method: str, batch: int) -> int:
    """Return the bytes that a training needs beyond the base, at its highest."""
    base, tokenizer = base_of()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    training = Training(METHODS[method], 1e-3, 0, _STEPS, batch)
    train(base, tokenizer, load(TASK, 200), training)
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(_memory(sys.argv[1], int(sys.argv[2])))
