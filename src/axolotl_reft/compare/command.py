"""``axolotl reft compare``: put what trainings gave side by side."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from axolotl_reft.compare.results import Run
from axolotl_reft.compare.runs import find_runs
from axolotl_reft.compare.settings import not_comparable, split_settings
from axolotl_reft.errors import did_you_mean
from axolotl_reft.inspect.command import check_output

# The numbers of every run, in the order of the table's columns.
NUMBERS = (
    "parameters", "eval_loss", "best_eval_loss", "loss", "mean_loss", "edit_size",
    "seconds", "bytes", "steps",
)  # fmt: skip


@dataclass
class Comparison:
    """Runs, the best first.

    Attributes:
        differing: names of settings that differ.
        same: settings that all have.
        scores: names of the runs' scores.
        sort: the column that they are sorted by.
        warning: why the losses cannot be compared, or empty.
    """

    runs: list[Run]
    differing: list[str]
    same: dict[str, Any]
    scores: list[str]
    sort: str
    warning: str

    def value(self, run: Run, column: str) -> Any:
        """Return a run's number, score or setting."""
        if column in NUMBERS:
            return getattr(run, column)
        return run.scores.get(column, run.settings.get(column))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, in which null stands for what is no number."""
        runs = []
        for run in self.runs:
            found = asdict(run) | {"lower_is_better": sorted(run.lower_is_better)}
            runs.append(found)
        found = asdict(self) | {"runs": runs}
        return _without_nan(found)


def compare(runs: list[Run], sort: str | None = None) -> Comparison:
    """Sort runs by a column, and find the settings in which they differ; ValueError
    if no run has the column."""
    differing, same = split_settings(
        [run.settings for run in runs],
        [run.as_written for run in runs],
        [run.adapter for run in runs],
    )
    scores = list(dict.fromkeys(name for run in runs for name in run.scores))
    found = Comparison(runs, differing, same, scores, sort or "", "")
    columns = (*NUMBERS, *scores, *differing)
    if sort and sort not in columns:
        raise ValueError(
            f"--sort: there is no column {sort!r}.{did_you_mean(sort, columns)} "
            f"Columns: {', '.join(columns)}"
        )
    if not sort:
        evaluated = any(run.eval_loss is not None for run in runs)
        found.sort = "eval_loss" if evaluated else "mean_loss"
    lower = {name for run in runs for name in run.lower_is_better}
    sign = -1 if found.sort in scores and found.sort not in lower else 1

    def key(run: Run) -> tuple[bool, bool, Any]:
        value = found.value(run, found.sort)
        if value is None or isinstance(value, float) and not math.isfinite(value):
            return True, True, 0
        is_text = isinstance(value, str)
        return False, is_text, value if is_text else sign * value

    found.runs = sorted(runs, key=key)
    if len([run for run in runs if run.loss is not None]) > 1:
        found.warning = not_comparable(differing)
    return found


def run(
    directories: Sequence[str],
    *,
    sort: str | None = None,
    plot: str | None = None,
    as_json: bool = False,
) -> None:
    """Print and draw a comparison; ValueError if an option or a directory is wrong."""
    check_output("compare", plot, as_json)
    found = compare(find_runs(directories), sort)
    if plot:
        from axolotl_reft.compare.plot import figure

        figure(found).savefig(plot, dpi=150)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        from axolotl_reft.compare.text import print_comparison

        print_comparison(found)
    if plot:
        # Standard output must stay valid JSON.
        print(f"wrote {plot}", file=sys.stderr if as_json else sys.stdout)


def show(directories: Sequence[str]) -> None:
    """Print a comparison, or how to get one where no tables can be printed."""
    if find_spec("rich") is None:
        names = " ".join(directories)
        print(f"pip install 'axolotl-reft[inspect]', then axolotl reft compare {names}")
    else:
        run(directories)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def short_names(runs: Sequence[Run]) -> list[str]:
    """Name runs by the end of their paths, as far as it tells them apart."""
    paths = [Path(run.directory).absolute().parts for run in runs]
    for count in range(1, max(map(len, paths), default=1) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [run.directory for run in runs]
