"""``python -m benchmarks.quality.strength``: accuracy at several strengths."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import table
from benchmarks.quality.methods import METHODS
from benchmarks.quality.training import Training, base_of, train
from examples.real.answers import accuracy
from examples.real.tasks import TASKS, load

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.strength",
        description="Train SmolLM2-135M-Instruct with LoReFT (l7, rank 8, all layers) "
        "and measure the share of right answers at several strengths.",
    )
    default = ["review sentiment", "linguistic mappings"]
    parser.add_argument("--task", nargs="+", choices=TASKS, default=default)
    parser.add_argument("--strengths", nargs="+", type=float, default=STRENGTHS)
    parser.add_argument("--learning-rate", type=float, default=9e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument(
        "--answers", type=int, default=200, help="held-out answers of each task's test"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    base, tokenizer = base_of()
    names = [f"{strength:g}" for strength in options.strengths]
    print(table.row(["strength", *names]))
    print(table.row(["---"] * (len(names) + 1)), flush=True)
    sizes = options.seed, options.steps, options.batch
    for name in options.task:
        task = load(name, options.answers)
        training = Training(METHODS["LoReFT l7"], options.learning_rate, *sizes)
        model, scores = train(base, tokenizer, task, training).model, list[str]()
        for strength in options.strengths:
            model.set_scale("default", strength)
            score = accuracy(model, tokenizer, task, task.test)
            scores.append(f"{score:.1f}")
        print(table.row([name, *scores]), flush=True)
        base = model.unload()


if __name__ == "__main__":
    main()
