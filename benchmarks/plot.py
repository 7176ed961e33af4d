"""Plots of the results, made from their JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Result, read_all, summary

_LABELS = {
    "hidden_size": "hidden size d",
    "rank": "rank r",
    "layers": "layers",
    "first": "positions on each side",
    "length": "length",
    "prompt": "tokens of the prompt",
}


def plot(result: Result, path: Path) -> bool:
    """Ratios to the floor over what the settings vary, with their whole range.

    Returns:
        False where there is nothing to plot: no two settings, or no ratios.
    """
    varied = [
        name
        for name in _LABELS
        if len({one.setting.get(name) for one in result.series}) > 1
    ]
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
    for name in sorted(names):
        _draw(axes, result, varied[0], name)
    axes.axhline(1, color="black", linewidth=0.8, label=result.floor)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(_LABELS[varied[0]])
    axes.set_ylabel(f"{result.benchmark}: ratio to {result.floor}")
    ratios = [ratio for line in axes.lines[:-1] for ratio in line.get_ydata()]
    if max(ratios) > 10 or min(ratios) < 0.1:
        axes.set_yscale("log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _draw(axes: Any, result: Result, varied: str, name: str) -> None:
    points = sorted(
        (one.setting[varied], *summary(one.ratios(name, result.floor)))
        for one in result.series
        if one.paired(name, result.floor)
    )
    x, low, middle, high = (list(column) for column in zip(*points, strict=True))
    (line,) = axes.plot(x, middle, marker="o", label=name)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2)


def write(directory: Path = RESULTS) -> list[Path]:
    """One PNG a result that varies something, beside its JSON."""
    paths = []
    for result in read_all(directory):
        device = "" if result.hardware.get("gpu") is None else "-gpu"
        path = directory / f"{result.benchmark}{device}.png"
        if plot(result, path):
            paths.append(path)
    return paths
