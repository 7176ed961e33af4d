"""Markdown tables of the results, made from their JSON."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import RESULTS, Result, Series, read_all, summary

# What tells one setting from another, and is worth a column.
_SHOWN = {
    "hidden_size": "d",
    "layers": "layers",
    "rank": "r",
    "first": "f",
    "last": "l",
    "batch": "batch",
    "length": "length",
    "prompt": "prompt",
    "samples": "samples",
    "dtype": "dtype",
}


def markdown(results: list[Result]) -> str:
    """All tables, one a benchmark."""
    return "\n".join(_section(result) for result in results)


def _section(result: Result) -> str:
    first = result.hardware
    machine = first["gpu"] or f"{first['cpu']}, {first['cores']} cores"
    packages = ", ".join(
        f"{name} {number}" for name, number in result.versions["here"].items()
    )
    lines = [
        f"## {result.benchmark}" + ", on a GPU" * bool(first["gpu"]),
        "",
        f"{machine}; {packages}; {result.date}. Ratios are to {result.floor}, round by "
        f"round: minimum / median / maximum.",
        "",
    ]
    columns = _columns(result.series)
    header = [*(_SHOWN[name] for name in columns), "who", f"median, {result.unit}"]
    header += ["ratio", "repetitions"]
    lines += [row(header), row(["---"] * len(header))]
    for series in result.series:
        shape = [str(series.setting.get(name, "")) for name in columns]
        lines += [row([*shape, *cells]) for cells in _cells(series, result.floor)]
        lines += [
            row([*shape, name, "failed", why.replace("|", "/")[:80], "0"])
            for name, why in series.failures.items()
        ]
    return "\n".join([*lines, ""])


def _columns(series: list[Series]) -> list[str]:
    """Settings that differ between the series, and the size."""
    found = [name for name in _SHOWN if any(name in one.setting for one in series)]
    return [
        name
        for name in found
        if name == "hidden_size"
        or len({str(one.setting.get(name)) for one in series}) > 1
    ]


def _cells(series: Series, floor: str) -> list[list[str]]:
    cells = []
    for name, values in series.values.items():
        ratio = "1"
        if series.paired(name, floor):
            found = summary(series.ratios(name, floor))
            ratio = " / ".join(f"{value:.3g}" for value in found)
        middle = summary(values)[1]
        cells.append([name, f"{middle:.4g}", ratio, str(len(values))])
    return cells


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(directory: Path = RESULTS) -> Path:
    """``results.md`` beside the JSON."""
    path = directory / "results.md"
    path.write_text("# Results\n\n" + markdown(read_all(directory)))
    return path
