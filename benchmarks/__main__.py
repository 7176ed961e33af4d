"""``python -m benchmarks``: run them, or make tables and plots of their results."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import plot, scale, table
from benchmarks.harness import RESULTS
from benchmarks.parts import PARTS
from benchmarks.running import ELSEWHERE, run
from benchmarks.suite import SUITE
from benchmarks.synchronisation import synchronisation

_ALONE = {**PARTS, "synchronisation": synchronisation}


def environment(directory: str) -> str | None:
    """The interpreter that ``make bench-environments`` made, if it did."""
    python = Path(__file__).parent / "environments" / directory / "bin" / "python"
    return str(python) if python.exists() else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "what",
        nargs="*",
        default=["all"],
        help=f"all, table, plot, scale, or of: {', '.join([*SUITE, *_ALONE])}",
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
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    names = options.what
    if names == ["all"]:
        alone = ["synchronisation"] if options.size == "gpu" else PARTS
        names = [*SUITE, *alone, "table", "plot"]
    unknown = set(names) - {*SUITE, *_ALONE, "table", "plot", "scale"}
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    pythons = {name: vars(options)[name] for name in ELSEWHERE}
    pythons = {name: python for name, python in pythons.items() if python}
    changes = {"device": options.device, "dtype": options.dtype}
    changes = {name: value for name, value in changes.items() if value}
    for name in names:
        if name == "table":
            print(table.write(options.results))
        elif name == "plot":
            print(*plot.write(options.results), sep="\n")
        elif name == "scale":
            print(scale.tables(options.results))
        elif name in _ALONE:
            print(_ALONE[name](options.size).write(options.results))
        elif SUITE[name].sizes[options.size]:
            result = run(name, SUITE[name], options.size, pythons, **changes)
            print(result.write(options.results))


if __name__ == "__main__":
    main()
