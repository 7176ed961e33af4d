"""Print compared runs as a table."""

from __future__ import annotations

from typing import Any

from rich import box, filesize
from rich.console import Console
from rich.table import Table
from rich.text import Text

from axolotl_reft.compare.command import NUMBERS, Comparison, short_names
from axolotl_reft.compare.results import LAST

# Wide enough that nothing wraps where there is no terminal.
_PIPED_WIDTH = 240
# Shown in other units; all other columns have the names that --sort takes.
_TITLES = {"seconds": "time", "bytes": "size"}


def print_comparison(found: Comparison) -> None:
    """Print what all runs have in common, a row for each, and their notes."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    table = Table(box=box.SIMPLE, pad_edge=False)
    by_title = columns(found)
    for title in by_title:
        is_text = title in ("run", "state")
        table.add_column(title, justify="left" if is_text else "right")
    for row in zip(*by_title.values(), strict=True):
        table.add_row(*map(Text, row))
    if found.same:
        same = ", ".join(f"{name}: {value}" for name, value in found.same.items())
        console.print(f"In all runs: {same}")
    console.print(table)
    meaning = f" (of the last {LAST} logged steps)" if found.sort == "mean_loss" else ""
    console.print(f"Sorted by {found.sort}{meaning}, the best first.")
    for name, run in zip(short_names(found.runs), found.runs, strict=True):
        for note in run.notes:
            console.print(f"{name}: {note}")
    if found.warning:
        console.print(found.warning)


def columns(found: Comparison) -> dict[str, list[str]]:
    """Return the titles of columns that tell something, and their cells."""
    runs = found.runs
    cells = {"run": short_names(runs)}
    if any(run.state != "finished" for run in runs):
        cells["state"] = [run.state for run in runs]
    for name in found.differing:
        cells[name] = [as_text(found.value(run, name)) for run in runs]
    for name in (*NUMBERS, *found.scores):
        values = [found.value(run, name) for run in runs]
        if all(value is None for value in values):
            continue
        if name == "best_eval_loss" and values == [run.eval_loss for run in runs]:
            continue
        cells[_TITLES.get(name, name)] = [_number(name, value) for value in values]
    return cells


def _number(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "bytes":
        return filesize.decimal(value)
    if name == "seconds":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes}:{seconds:02}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def as_text(value: Any) -> str:
    """Write a setting; nothing where a run has none."""
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)
