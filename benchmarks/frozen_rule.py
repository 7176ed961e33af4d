"""Where two parts of a step save time, measured, beside the rule that chooses them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from axolotl_reft.tuner.frozen_base import saves_time
from benchmarks.base import Setting, base_config
from benchmarks.harness import RESULTS, Series, read, summary
from benchmarks.table import row

# Two parts must not be chosen where they take more, and must be where they take less.
_MOST, _LEAST = 1.01, 0.9


def chooses_two_parts(setting: Setting, kept: bool) -> bool:
    """Whether the rule has a step of a setting in two parts."""
    before = setting.batch * (setting.prompt - setting.last)
    tokens = setting.batch * setting.length
    parts: Any = SimpleNamespace(
        tokens_before=0 if kept else before, tokens_behind=tokens - before
    )
    backbone: Any = SimpleNamespace(
        config=base_config(setting), device=torch.device(setting.device)
    )
    return saves_time(backbone, tokens, parts, backward=1.0)


def rule_table(directory: Path = RESULTS) -> str:
    """Return a Markdown table of the measured ratios with the rule's choices; wrong
    ones are marked."""
    result = read(directory / "frozen-prompt-rule.json")
    header = ["d", "samples × tokens", "of each before l7"]
    header += ["first time", "chosen", "kept", "chosen"]
    rows = [row(header), row(["---"] * len(header))]
    return "\n".join([*rows, *map(_rule_row, result.series)])


def _rule_row(series: Series) -> str:
    setting = Setting.read(series.setting)
    before = setting.prompt - setting.last
    cells = [str(setting.hidden_size), f"{setting.batch}×{setting.length}", str(before)]
    for name in ("frozen", "kept"):
        ratio = summary(series.ratios(name, "labelled"))[1]
        chosen = chooses_two_parts(setting, kept=name == "kept")
        wrong = ratio > _MOST if chosen else ratio <= _LEAST
        cells += [f"{ratio:.2f}", ("two parts" if chosen else "whole") + " (!)" * wrong]
    return row(cells)
