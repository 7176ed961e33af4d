"""The folder's configs for axolotl, for any of its tasks."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import yaml

from examples.real.tasks import TASKS, folder_of

# By the names of their folders.
TASK_NAMES = {folder_of(name): name for name in TASKS}


def read(config: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    return settings


def config_file(path: str) -> Path:
    """Return an argument's path; ArgumentTypeError if there is no such file."""
    if not Path(path).is_file():
        raise ArgumentTypeError(f"there is no file {path!r}")
    return Path(path)


def task_name(settings: dict[str, Any]) -> str:
    """Return the task whose data a config trains on.

    Raises:
        ValueError: there is none.
    """
    path = Path(settings["datasets"][0]["path"])
    if path.parent.name not in TASK_NAMES:
        raise ValueError(
            f"{path} is no task's data; name the train.jsonl of one of "
            f"{', '.join(TASK_NAMES)} below examples/real/data"
        )
    return TASK_NAMES[path.parent.name]


def adapted(config: Path, model: str | None, folder: str | None) -> Path:
    """Return a config with another base or task, written beside its adapter unless it
    is the given one.

    Args:
        model: the base's folder, and ``folder`` the task's; None leaves it.
    """
    settings = read(config)
    base = Path(settings["base_model"])
    data = Path(settings["datasets"][0]["path"])
    settings["base_model"] = str(base.with_name(model or base.name))
    folder = folder or data.parent.name
    settings["datasets"][0]["path"] = str(data.parents[1] / folder / data.name)
    if settings == read(config):
        return config
    name = config.stem.replace(base.name, model or base.name)
    directory = Path(settings["output_dir"]).with_name(f"{name}-{folder}")
    settings["output_dir"] = str(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = directory / f"{name}.yml"
    written.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return written
