"""``python -m benchmarks.sweep``: check every architecture, and write the page."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

from benchmarks.sweep import table
from benchmarks.sweep.architectures import architectures
from benchmarks.sweep.findings import Row
from benchmarks.sweep.running import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description="Compare LoReFT on every architecture of transformers with a plain "
        "reference; exits with 1 where one is wrong.",
    )
    parser.add_argument("names", nargs="*", help="model classes; all if left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--limit", type=float, default=120, help="seconds for each architecture"
    )
    parser.add_argument("--json", type=Path, help="where all findings go")
    parser.add_argument(
        "--write", action="store_true", help=f"write {table.PAGE.name}, of all"
    )
    parser.add_argument(
        "--check", action="store_true", help="fail where the page has other results"
    )
    return parser


def _report(row: Row) -> None:
    line = f"{row.verdict:12} {row.kind:10} {row.name} {row.seconds:.1f} s"
    print("  ".join(filter(None, [line, row.note, table.why(row)])), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    known = {architecture.name: architecture for architecture in architectures()}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"transformers has no {', '.join(unknown)} that takes text")
    if options.write and options.names:
        parser.error("--write: the page has every architecture; leave the names out")
    chosen = [known[name] for name in options.names] or list(known.values())
    rows = run(chosen, options.jobs, options.limit, _report)
    print(dict(Counter(row.verdict for row in rows)))
    if options.json:
        options.json.write_text(json.dumps([row.to_dict() for row in rows], indent=1))
    if options.write:
        table.PAGE.write_text(table.markdown(rows))
    failed = any(row.verdict == "WRONG" for row in rows)
    if options.check:
        listed = table.verdicts(table.PAGE.read_text())
        for row in rows:
            if listed.get(row.name) != row.verdict:
                failed = True
                known_as = listed.get(row.name)
                print(f"{row.name}: {row.verdict}, and the page has {known_as}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
