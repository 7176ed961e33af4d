"""``python -m examples.real.train CONFIG``: train with axolotl, and score."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from examples.real.score import report
from examples.real.settings import TASK_NAMES, adapted, config_file, read

_KEPT_LINES = 30
_LOSS = re.compile(r"'loss': '([\d.e+-]+)'")
_STEP = re.compile(r"(\d+)/(\d+) \[([\d:]+)<")
# Options of axolotl that scoring, which reads the config, would not know of.
_OF_THE_CONFIG = ("--output-dir", "--base-model", "--bf16")


def train(config: Path, options: Sequence[str]) -> None:
    """Run ``axolotl train``, showing its progress only.

    Raises:
        SystemExit: it failed; with the end of its output.
    """
    command = ["axolotl", "train", str(config), *options]
    log = Path(read(config)["output_dir"]) / "debug.log"
    print(f"\n$ {' '.join(command)}\nIts output is in {log}.", flush=True)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    last, step = list[str](), ""
    for line in process.stdout:
        last = [*last, line][-_KEPT_LINES:]
        if found := _STEP.findall(line):
            number, total, time = found[-1]
            step = f"step {number} of {total}, after {time}"
        if found := _LOSS.findall(line):
            print(f"  {step}: loss {found[-1]}", flush=True)
    if process.wait():
        print("".join(last))
        raise SystemExit(f"axolotl train failed; all that it wrote is in {log}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.real.train",
        allow_abbrev=False,
        description="Train a task with each config by axolotl train, then score the "
        "adapters and their base. Other options are axolotl's, such as "
        "--max-steps 100.",
    )
    parser.add_argument("config", nargs="+", type=config_file)
    parser.add_argument("--model", help="the base's folder; default: the config's")
    parser.add_argument(
        "--task", choices=TASK_NAMES, help="its data's folder; default: the config's"
    )
    parser.add_argument(
        "--shown", type=int, default=3, metavar="N", help="questions to show"
    )
    options, others = parser.parse_known_args(arguments)
    for name in (other.partition("=")[0] for other in others):
        if name in _OF_THE_CONFIG:
            parser.error(f"{name}: scoring reads it from the config; set it there")
    configs = [adapted(path, options.model, options.task) for path in options.config]
    for config in configs:
        train(config, others)
    report(configs, options.shown)


if __name__ == "__main__":
    main()
