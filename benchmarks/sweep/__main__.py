"""``python -m benchmarks.sweep``: check every architecture, and write the table."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from benchmarks.sweep.architectures import architectures
from benchmarks.sweep.findings import Row
from benchmarks.sweep.running import run


def _report(row: Row) -> None:
    worst = [f for f in row.findings if f.verdict == row.verdict]
    why = ""
    if row.verdict != "right":
        why = "; ".join(
            f"{f.check}" + (f" {f.difference:.1e}" if f.difference is not None else "")
            + (f" (base {f.base:.1e})" if f.base is not None else "") + f" {f.message}"
            for f in worst
        )
    print(f"{row.verdict:16} {row.name} [{row.kind}] {row.seconds}s {row.note} | {why}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("names", nargs="*", help="model classes; all if left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=120, help="seconds for each")
    parser.add_argument("--results", type=Path, default=Path("build/sweep.json"))
    options = parser.parse_args()
    chosen = [a for a in architectures() if not options.names or a.name in options.names]
    rows = run(chosen, options.jobs, options.limit, _report)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps([row.to_dict() for row in rows]))


if __name__ == "__main__":
    main()
