"""``python -m benchmarks.serving``: measure serving, in vLLM's environment."""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from statistics import median

from benchmarks import table
from benchmarks.harness import (
    RESULTS,
    Result,
    Series,
    hardware,
    middle_half,
    now,
    versions,
)
from benchmarks.parts import SHAPES
from benchmarks.serving.engine import CLOCKS
from benchmarks.serving.memory import memory
from benchmarks.serving.models import TOY
from benchmarks.serving.speed import MODES, PAIRS, PREFIX_PAIRS, speed

_SIZES: dict[str, dict[str, int]] = {
    "toy": {"batch": 2, "length": 32, "steps": 2, "prefix": 64, "adapters": 2},
    "full": {"batch": 8, "length": 256, "steps": 64, "prefix": 1024, "adapters": 64},
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Measure LoReFT served by vLLM, in its environment.",
    )
    parser.add_argument(
        "--model",
        action="append",
        help="tiny (d 512, 8 layers), smollm2 (built from a package of 93 MB), or a "
        "directory; may be repeated; default: tiny and smollm2",
    )
    parser.add_argument("--mode", action="append", choices=MODES, help="default: both")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu: the process's time, with OMP_NUM_THREADS=1 on a machine in use",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", default="full", choices=_SIZES)
    parser.add_argument(
        "--write",
        action="store_true",
        help="write results/",
    )
    return parser


# By benchmark: the unit, the floor of ``results.md``, and who is compared with whom.
_BENCHMARKS: dict[str, tuple[str, str, tuple[tuple[str, str], ...]]] = {
    "serving-prefill": ("s", "base", PAIRS),
    "serving-decode": ("s", "base", PAIRS),
    "serving-first-token": ("s", "base", PREFIX_PAIRS),
    "serving-memory": ("B", "slots", ()),
    "serving-load": ("s", "worker", ()),
}


def report(result: Result) -> str:
    """Return a table of medians, and of the ratios of those that are compared, with the
    half of the rounds in the middle."""
    _, _, pairs = _BENCHMARKS[result.benchmark]
    header = ["model", "mode", "who", f"median, {result.unit}", "over", "ratio"]
    lines = [f"## {result.benchmark}", "", table.row(header)]
    lines.append(table.row(["---"] * len(header)))
    for series in result.series:
        shape = [str(series.setting.get(name, "")) for name in ("model", "mode")]
        for name, values in series.values.items():
            over = [other for who, other in pairs if who == name]
            for other in over or [""]:
                ratio = ""
                if other:
                    found = "{:.3f} ({:.3f} to {:.3f})"
                    ratio = found.format(*middle_half(series.ratios(name, other)))
                middle = f"{median(values):.4g}"
                lines.append(table.row([*shape, name, middle, other, ratio]))
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    sizes, found = _SIZES[options.size], dict[str, list[Series]]()
    for model in options.model or ["tiny", "smollm2"]:
        for mode in options.mode or MODES:
            # A process of its own gives back the memory of its engines.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                job = pool.submit(
                    speed, model, mode, sizes, options.rounds, options.clock
                )
                for name, series in job.result().items():
                    found.setdefault(name, []).append(series)
    shape = TOY if options.size == "toy" else replace(SHAPES["8B"], tied=True)
    held, loading = memory(shape, sizes["adapters"])
    found |= {"serving-memory": [held], "serving-load": [loading]}
    here = {"here": versions()}
    for name, series_of in found.items():
        unit, floor, _ = _BENCHMARKS[name]
        result = Result(name, unit, floor, series_of, here, hardware(), now())
        print(report(result))
        if options.write:
            print(result.write(RESULTS))
    if options.write:
        print(table.write(RESULTS))


if __name__ == "__main__":
    main()
