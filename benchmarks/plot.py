"""Plots of the results, made from their JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Result, Series, read_all, summary

_LABELS = {
    "hidden_size": "hidden size d",
    "rank": "rank r",
    "layers": "layers",
    "first": "positions on each side",
    "length": "length",
    "prompt": "tokens of the prompt",
}
# What goes along with another setting: the layers of a wider model are fewer.
_ALONG = {"layers": "hidden_size", "prompt": "length"}


def plot(result: Result, path: Path) -> bool:
    """Ratios to the floor with their whole range: lines over what the settings vary,
    and points side by side where they vary several things.

    Returns:
        False where there is nothing to plot: no two settings, or no ratios.
    """
    varied = [name for name in _LABELS if len(_values(result, name)) > 1]
    names = {
        name
        for one in result.series
        for name in one.values
        if one.paired(name, result.floor)
    }
    if not varied or not names:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    alone = [name for name in varied if _ALONG.get(name) not in varied]
    if len(alone) == 1 and len(_values(result, alone[0])) == len(result.series):
        for name in sorted(names):
            _line(axes, result, alone[0], name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel(_LABELS[alone[0]])
    else:
        for number, name in enumerate(sorted(names)):
            _points(axes, result, name, 0.15 * (number - (len(names) - 1) / 2))
        labels = [_label(one, varied) for one in result.series]
        axes.set_xticks(range(len(labels)), labels)
    axes.axhline(1, color="black", linewidth=0.8, label=result.floor)
    axes.set_ylabel(f"{result.benchmark}: ratio to {result.floor}")
    middle = [found[1] for name in names for _, found in _ranges(result, name)]
    if max(middle) > 10 or min(middle) < 0.1:
        axes.set_yscale("log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _values(result: Result, name: str) -> set[Any]:
    return {one.setting.get(name) for one in result.series}


def _ranges(result: Result, name: str) -> list[tuple[Series, tuple[float, ...]]]:
    """A contestant's minimum, median and maximum, where it has ratios."""
    return [
        (one, summary(one.ratios(name, result.floor)))
        for one in result.series
        if one.paired(name, result.floor)
    ]


def _line(axes: Any, result: Result, varied: str, name: str) -> None:
    points = sorted(
        (one.setting[varied], *found) for one, found in _ranges(result, name)
    )
    x, low, middle, high = (list(column) for column in zip(*points, strict=True))
    (line,) = axes.plot(x, middle, marker="o", label=name)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2)


def _points(axes: Any, result: Result, name: str, beside: float) -> None:
    points = [
        (result.series.index(one) + beside, *found)
        for one, found in _ranges(result, name)
    ]
    x, low, middle, high = (list(column) for column in zip(*points, strict=True))
    (line,) = axes.plot(x, middle, marker="o", linestyle="", label=name)
    axes.vlines(x, low, high, color=line.get_color(), alpha=0.4, linewidth=4)


def _label(one: Series, varied: list[str]) -> str:
    """A setting, in a line each: its size, its batch, and what else is varied."""
    setting = one.setting
    lines = [f"d={setting['hidden_size']}"]
    if "batch" in setting:
        lines.append(f"{setting['batch']}×{setting['length']}")
    lines += [f"prompt {setting['prompt']}"] * ("prompt" in varied)
    lines += [f"rank {setting['rank']}"] * ("rank" in varied)
    return "\n".join(lines)


def write(directory: Path = RESULTS) -> list[Path]:
    """One PNG a result that varies something, beside its JSON."""
    paths = []
    for result in read_all(directory):
        device = "" if result.hardware.get("gpu") is None else "-gpu"
        path = directory / f"{result.benchmark}{device}.png"
        if plot(result, path):
            paths.append(path)
    return paths
