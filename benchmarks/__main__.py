"""``python -m benchmarks``: run them, or make tables and plots of their results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import frozen_rule, plot, scale, table
from benchmarks.harness import RESULTS, before_and_after
from benchmarks.parts import PARTS, build
from benchmarks.running import ELSEWHERE, run, workers
from benchmarks.suite import SUITE, Benchmark, with_before
from benchmarks.synchronisation import synchronisation
from benchmarks.worker import environment

_ALONE = {**PARTS, "synchronisation": synchronisation}
# Made of results that are there, and printed.
_MADE: dict[str, Callable[[Path], object]] = {
    "table": table.write,
    "plot": lambda results: "\n".join(map(str, plot.write(results))),
    "scale": scale.tables,
    "rule": frozen_rule.rule_table,
}
_COMPARISONS = Path("build/comparisons")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "what",
        nargs="*",
        default=["all"],
        help="quality (with options of its own), all, table, plot, scale, rule, or "
        f"of: {', '.join([*SUITE, *_ALONE])}",
    )
    parser.add_argument(
        "--size", default="quick", choices=["toy", "quick", "full", "gpu"]
    )
    parser.add_argument("--device", help="cpu or cuda, in the place of the settings'")
    parser.add_argument("--dtype", help="in the place of the settings'")
    for name, directory in ELSEWHERE.items():
        parser.add_argument(
            f"--{directory}-python",
            dest=name,
            default=environment(directory),
            help="interpreter of its own environment, where make has not made it",
        )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="SRC",
        help="src/ of another checkout, whose `ours` takes turns as `before`",
    )
    parser.add_argument(
        "--contestants",
        help="who takes part, separated by commas; ratios are to the first",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="where JSON goes; results/ beside the benchmarks, or with --before or "
        f"--contestants {_COMPARISONS}/",
    )
    return parser


def _selected(
    parser: argparse.ArgumentParser, options: argparse.Namespace, names: list[str]
) -> dict[str, Benchmark]:
    """The suite, with the contestants that the options ask for."""
    suite = dict(SUITE)
    if options.before:
        if unpaired := [n for n in names if n not in _MADE and not _has_ours(n)]:
            parser.error(f"--before: {', '.join(unpaired)} cannot run another build")
        suite = {n: with_before(b) for n, b in SUITE.items() if "ours" in b.contestants}
    if options.contestants:
        chosen = tuple(options.contestants.split(","))
        for name in set(names) - _MADE.keys():
            known = suite[name].contestants if name in suite else ()
            if missing := [one for one in chosen if one not in known]:
                parser.error(
                    f"--contestants: {name} has no {', '.join(missing)}, but "
                    f"{', '.join(known) or 'none to choose from'}"
                )
            suite[name] = replace(suite[name], contestants=chosen)
    return suite


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["quality"]:
        from benchmarks.quality.__main__ import main as quality

        return quality(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    narrowed = options.before or options.contestants
    results = options.results or (_COMPARISONS if narrowed else RESULTS)
    names = options.what
    if names == ["all"]:
        alone = ["synchronisation"] if options.size == "gpu" else PARTS
        names = [*SUITE, *alone, "table", "plot"]
    unknown = set(names) - {*SUITE, *_ALONE, *_MADE}
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    suite = _selected(parser, options, names)
    pythons = {name: vars(options)[name] for name in ELSEWHERE}
    pythons = {name: python for name, python in pythons.items() if python}
    changes = {"device": options.device, "dtype": options.dtype}
    changes = {name: value for name, value in changes.items() if value}
    elsewhere = workers(pythons, options.before)
    for name in names:
        if name in _MADE:
            print(_MADE[name](results))
        elif name in _ALONE or suite[name].sizes[options.size]:
            if name == "build":
                result = build(options.size, options.before)
            elif name in _ALONE:
                result = _ALONE[name](options.size)
            else:
                result = run(name, suite[name], options.size, elsewhere, **changes)
            print(*before_and_after(result), result.write(results), sep="\n")


def _has_ours(name: str) -> bool:
    """Whether a benchmark can run ``ours`` of another build."""
    return name == "build" or name in SUITE and "ours" in SUITE[name].contestants


if __name__ == "__main__":
    main()
