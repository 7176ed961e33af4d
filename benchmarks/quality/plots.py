"""Plots of what trainings gave: a panel for each task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality.results import Results, Run

# Of which the learning curves are drawn.
CURVES = ("LoReFT l7", "LoReFT all, identity", "LoRA r8")
_SMOOTHED = 5


def write(results: Results, directory: Path) -> list[Path]:
    """Write the plots as PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    plots: dict[str, Callable[[Any, Results, str], None]] = {
        "accuracy-by-parameters": _by_parameters,
        "accuracy-by-time": _by_time,
        "learning-curve": _curves,
    }
    paths = [directory / f"{name}.png" for name in plots]
    for path, draw in zip(paths, plots.values(), strict=True):
        _figure(results, draw, path)
    return paths


def _figure(
    results: Results, draw: Callable[[Any, Results, str], None], path: Path
) -> None:
    from matplotlib import pyplot

    tasks = list(results.base)
    columns = min(len(tasks), 3)
    rows = -(-len(tasks) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3.2 * rows + 0.8), squeeze=False
    )
    labels = dict[str, Any]()
    for axis, task in zip(axes.flat, tasks, strict=False):
        draw(axis, results, task)
        axis.set_title(task)
        handles, names = axis.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    figure.legend(
        labels.values(), labels.keys(), loc="lower center", ncols=4, fontsize="small"
    )
    lines = -(-len(labels) // 4)
    figure.tight_layout(rect=(0, 0.03 + 0.035 * lines, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _by_parameters(axis: Any, results: Results, task: str) -> None:
    _points(axis, results, task, lambda runs: runs[0].parameters)
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("trained parameters")


def _by_time(axis: Any, results: Results, task: str) -> None:
    _points(axis, results, task, lambda runs: mean(run.seconds for run in runs))
    axis.set_xlabel("CPU seconds of training")


def _points(
    axis: Any, results: Results, task: str, place: Callable[[list[Run]], float]
) -> None:
    for number, method in enumerate(results.methods):
        if not (runs := results.of(task, method)):
            continue
        scores = [run.test for run in runs if run.test is not None]
        middle = mean(scores)
        axis.errorbar(
            place(runs),
            middle,
            [[middle - min(scores)], [max(scores) - middle]],
            # LoRA's stand out.
            marker="s" if method.startswith("LoRA") else "o",
            color=f"C{number}",
            mfc="white" if number >= 10 else None,
            capsize=2,
            linestyle="",
            label=method,
        )
    axis.axhline(results.base[task], color="grey", linewidth=0.8, label="base")
    axis.set_ylabel("right answers, %")


def _curves(axis: Any, results: Results, task: str) -> None:
    for number, method in enumerate(CURVES):
        if runs := results.of(task, method):
            steps = [mean(of) for of in zip(*(r.losses for r in runs), strict=True)]
            parts = [
                steps[max(0, n - _SMOOTHED + 1) : n + 1] for n in range(len(steps))
            ]
            at = range(1, len(steps) + 1)
            axis.plot(at, list(map(mean, parts)), color=f"C{number}", label=method)
    axis.set_yscale("log")
    axis.set_xlabel(f"step (mean of the last {_SMOOTHED})")
    axis.set_ylabel("training loss")
