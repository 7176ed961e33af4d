"""Draw compared runs: their losses by step, and what a setting changes.

Lines differ in shade, dash and marker, so that they can be told apart in grey.
"""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from axolotl_reft.compare.command import Comparison, short_names
from axolotl_reft.compare.results import Run
from axolotl_reft.compare.text import as_text

_COLORS = [
    "#003f7f", "#e08214", "#222222", "#5aae61", "#9970ab", "#c51b7d", "#35978f",
    "#8c510a",
]  # fmt: skip
_STYLES = ["-", "--", "-.", ":"]
# One fewer than the colors, so that their pairs repeat late.
_MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
# More lines would not be told apart.
_MAX_CURVES = 8
# Longer labels would leave no room for the lines.
_LABEL_LENGTH = 60


def figure(found: Comparison) -> Figure:
    """Draw the losses of the best runs, and the sorted column of all of them."""
    drawing = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = drawing.subplots(1, 2)
    _draw_curves(left, found)
    _draw_column(right, found)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    return drawing


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLORS[number % len(_COLORS)],
        "linestyle": _STYLES[number % len(_STYLES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
    }


def _draw_curves(axis: Axes, found: Comparison) -> None:
    evaluated = any(len(run.curves.get("eval_loss", {})) > 1 for run in found.runs)
    name = "eval_loss" if evaluated else "loss"
    names = short_names(found.runs)
    drawn = [(n, r) for n, r in zip(names, found.runs, strict=True) if r.curves]
    for number, (label, run) in enumerate(drawn[:_MAX_CURVES]):
        curve = run.curves[name]
        every = max(len(curve) // 8, 1)
        style = _style(number) | {"markevery": every}
        axis.plot(list(curve), list(curve.values()), label=_short(label), **style)
    left_out = len(drawn) - _MAX_CURVES
    more = f" (the best {_MAX_CURVES} of {len(drawn)})" if left_out > 0 else ""
    axis.set_title(f"{name} by step{more}", fontsize=10)
    axis.set(xlabel="step", ylabel=name)
    if drawn:
        axis.legend(fontsize=7)


def _draw_column(axis: Axes, found: Comparison) -> None:
    """Draw the sorted column over the numeric setting with the most values, a line for
    each combination of the others; over parameters if no setting is numeric.

    A line is labelled with its settings, and one of a single run with the run's name.
    """
    x_name = x_axis(found)
    others = [name for name in found.differing if name != x_name]
    lines: dict[str, list[tuple[float, float]]] = {}
    alone: dict[str, str] = {}
    for name, run in zip(short_names(found.runs), found.runs, strict=True):
        x, y = found.value(run, x_name), found.value(run, found.sort)
        if _is_number(x) and _is_number(y):
            lines.setdefault(label := _label(run, others), []).append((x, y))
            alone[label] = name
    for number, (label, points) in enumerate(sorted(lines.items())):
        shown = _short(label if len(points) > 1 else alone[label])
        axis.plot(*zip(*sorted(points), strict=True), label=shown, **_style(number))
    values = [x for points in lines.values() for x, _ in points]
    if values and min(values) > 0 and max(values) >= 4 * min(values):
        axis.set_xscale("log")
        axis.set_xticks(sorted(set(values)), [f"{x:g}" for x in sorted(set(values))])
        axis.minorticks_off()
    axis.set_title(f"{found.sort} by {x_name}", fontsize=10)
    axis.set(xlabel=x_name, ylabel=found.sort)
    if any(lines):
        axis.legend(fontsize=7)


def x_axis(found: Comparison) -> str:
    """Return the differing setting with the most numbers as values, or parameters."""
    counts = {}
    for name in found.differing:
        values = [found.value(run, name) for run in found.runs]
        numbers = {value for value in values if _is_number(value)}
        if len(numbers) > 1:
            counts[name] = len(numbers)
    return max(counts, key=lambda name: counts[name]) if counts else "parameters"


def _short(label: str) -> str:
    # Not textwrap.shorten: it leaves nothing of a long name without spaces.
    return label if len(label) <= _LABEL_LENGTH else f"{label[: _LABEL_LENGTH - 1]}…"


def _label(run: Run, names: list[str]) -> str:
    settings = {name: as_text(run.settings.get(name)) for name in names}
    return ", ".join(f"{name} {text}" for name, text in settings.items() if text)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
