"""The page of the documentation with a row for each architecture."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from benchmarks.sweep.findings import TOLERANCE, VERDICTS, Row
from benchmarks.table import row as cells

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_VERSIONS = ("transformers", "peft", "torch")
_KINDS = {
    "causal": "Causal language models",
    "multimodal": "Multimodal models",
    "masked": "Masked language models",
    "encoder": "Encoders without a head",
}
_INTRODUCTION = """\
# Architectures

`python -m benchmarks.sweep --write` writes this page, in ten minutes on two cores. It
builds every architecture of transformers that takes text, tiny and with random weights,
and compares LoReFT with a plain reference: a copy of the bare base that edits the
expected tokens in what each layer returns, in the layers that a text runs through.
Compared are one row with `f2+l2` and with `all`; batches of equal length and padded on
either side, also with each row alone; loss and gradients with labels; greedy generation
with a cache and without; a saved and loaded adapter; gradients under both kinds of
gradient checkpointing; and images or sounds before the text, where the sweep knows a
form of them that the base takes.

- *right*: in every check the largest difference is at most {tolerance:g} of the largest
  logit or gradient, or at most ten times what the base itself is off there.
- *refused*: an error says so when the adapter is made or at the first forward.
- *not compared*: the base does not run on the inputs that the sweep has, or no list of
  layers returns hidden states of the text; the note says which.
- *not built*: transformers does not build it small, or not without another package.
- *base itself off*: the base, without any adapter, differs between two ways to run it
  (a row alone and padded, with a cache and without), or fails in this check.

Run with {versions}.

"""


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in _VERSIONS)


def markdown(rows: list[Row]) -> str:
    """Return the whole page."""
    parts = [_INTRODUCTION.format(tolerance=TOLERANCE, versions=versions())]
    names = [v for v in VERDICTS if any(row.verdict == v for row in rows)]
    counts = [_counts(title, kind, rows, names) for kind, title in _KINDS.items()]
    parts.append(_table(["", *names], counts))
    for kind, title in _KINDS.items():
        found = [row for row in rows if row.kind == kind]
        parts.append(f"\n## {title}\n\n")
        header = ["architecture", "result", "base itself off", "note"]
        parts.append(_table(header, [_row(row) for row in found]))
    return "".join(parts)


def _counts(title: str, kind: str, rows: list[Row], names: list[str]) -> list[str]:
    counts = Counter(row.verdict for row in rows if row.kind == kind)
    return [title, *(str(counts[name]) for name in names)]


def _row(row: Row) -> list[str]:
    return [f"`{row.name}`", row.verdict, base_off(row), _note(row)]


def base_off(row: Row) -> str:
    """Name the checks in which the base itself differs or fails."""
    off = [
        _short(finding.check) + (f" {finding.base:.0e}" if finding.base else " fails")
        for finding in row.findings
        if (finding.base or 0.0) > TOLERANCE or finding.verdict == "base itself"
    ]
    return "; ".join(off)


def _short(check: str) -> str:
    return check.removesuffix(", alone").removesuffix(" or not")


def why(row: Row) -> str:
    """Say what made the verdict, where that is not right."""
    if row.verdict in ("right", "base itself"):
        return ""
    return "; ".join(
        finding.check
        + (f" {finding.difference:.1e}" if finding.difference is not None else "")
        + (f" {finding.message}" if finding.message else "")
        for finding in row.findings
        if finding.verdict == row.verdict
    )


def _note(row: Row) -> str:
    first = next((f for f in row.findings if f.verdict == row.verdict), None)
    message = first.message if first and row.verdict != "right" else ""
    # An error's class says nothing to a reader of the page.
    message = re.sub(r"^(the base itself: )?\w+(Error|Found|Failed): ", r"\1", message)
    inputs: dict[str, str] = {}
    for finding in row.findings:
        name, colon, _ = finding.check.partition(": ")
        if colon and inputs.get(name) != "refused":
            inputs[name] = finding.verdict if finding.verdict == "refused" else "too"
    more = [f"{name} {result}" for name, result in inputs.items()]
    return _escaped("; ".join(filter(None, [row.note, message, *more])))[:220]


def _escaped(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;").replace("*", "\\*")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(cells(line) + "\n" for line in lines)


def verdicts(page: str) -> dict[str, str]:
    """Return the verdict of each architecture of a page."""
    return dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", page, re.MULTILINE))


def written_with(page: str, package: str) -> str:
    """Return the version of a package that a page names."""
    match = re.search(rf"{package} ([\w.]+)", page)
    assert match is not None, f"the page names no version of {package}"
    return match[1].rstrip(".")
