"""``python -m benchmarks quality``: accuracy of adapters on a pretrained model."""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

from benchmarks.quality import costs, plots
from benchmarks.quality.measuring import Measurement
from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import read, report
from benchmarks.quality.training import base_of
from benchmarks.worker import environment
from examples.real.tasks import TASKS, load

RESULTS = Path(__file__).parent / "results.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality",
        description="Train SmolLM2-135M-Instruct on tasks with LoReFT and LoRA, and "
        "measure the share of right answers. What --results holds is not run again.",
    )
    parser.add_argument(
        "--task",
        action="append",
        choices=TASKS,
        help="may be repeated; default: all",
    )
    parser.add_argument(
        "--method",
        action="append",
        choices=METHODS,
        help="may be repeated; default: all",
    )
    parser.add_argument(
        "--pyreft-python",
        default=environment("pyreft"),
        help="interpreter of pyreft's environment, where make has not made it",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument(
        "--answers", type=int, default=200, help="held-out answers of each task's test"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--plot", type=Path, metavar="DIR", help="draw what --results holds, and end"
    )
    parser.add_argument(
        "--costs",
        type=int,
        metavar="ROUNDS",
        help="measure time and memory of the methods in turns instead",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.costs:
        chosen = options.method or METHODS
        found = costs.measure(*base_of(), options.batch, options.costs, chosen)
        costs.write(found)
        print(costs.report(found))
        return
    shared = ("steps", "batch", "answers")
    settings = {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "bfloat16",
        **{name: getattr(options, name) for name in shared},
    }
    results = read(options.results, settings)
    if options.plot:
        print(*plots.write(results, options.plot), sep="\n")
        return
    base, tokenizer = base_of()
    tasks = cache(lambda name: load(name, options.answers))
    measurement = Measurement(
        results, options.results, base, tokenizer, tasks, options.pyreft_python
    )
    names = options.task or list(TASKS)
    measurement.run(names, options.method or METHODS, options.seeds)
    print(report(results))


if __name__ == "__main__":
    main()
