"""``python -m benchmarks.quality``: accuracy by positions on a pretrained model."""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

from benchmarks.quality.measuring import Measurement
from benchmarks.quality.results import read, report
from benchmarks.quality.tasks import DEFAULT, TASKS, load
from benchmarks.smollm2 import smollm2

RESULTS = Path(__file__).parent / "results.json"
# In the order in which they are run.
POSITIONS = ("l7", "f7+l7", "l1", "l4", "all")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Train SmolLM2-135M-Instruct with LoReFT at several positions and "
        "measure the share of right answers. What --results holds is not run again.",
    )
    parser.add_argument(
        "--task",
        action="append",
        choices=TASKS,
        help=f"may be repeated; default: {', '.join(DEFAULT)}",
    )
    parser.add_argument("--positions", nargs="+", default=POSITIONS)
    parser.add_argument(
        "--learning-rate",
        nargs="+",
        type=float,
        default=[9e-4],
        help="of several, the first seed chooses by validation, for each task and "
        "positions",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument(
        "--answers", type=int, default=200, help="held-out answers of each task's test"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def main(arguments: list[str] | None = None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = _parser().parse_args(arguments)
    shared = ("rank", "steps", "batch", "answers")
    settings = {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "bfloat16",
        **{name: getattr(options, name) for name in shared},
    }
    results = read(options.results, settings)
    # On a CPU, eager attention is faster than sdpa for short rows in bfloat16.
    base = AutoModelForCausalLM.from_pretrained(
        smollm2(), dtype=torch.bfloat16, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tasks = cache(lambda name: load(name, options.answers))
    measurement = Measurement(results, options.results, base, tokenizer, tasks)
    names = options.task or DEFAULT
    measurement.run(names, options.positions, options.learning_rate, options.seeds)
    print(report(results))


if __name__ == "__main__":
    main()
