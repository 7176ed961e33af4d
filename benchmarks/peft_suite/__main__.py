"""Run PEFT's generic tests with LoReFT: ``python -m benchmarks.peft_suite CHECKOUT``.

CHECKOUT holds PEFT's sources and tests, such as its unpacked sdist. It must be of the
version that is installed. More arguments are pytest's, such as ``-k merge``. Nothing is
downloaded: the models are built from configs, with random weights. It takes three
minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Read when transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import pytest
import torch
import transformers

from benchmarks.peft_suite.expected import EXPECTED, judge
from benchmarks.peft_suite.models import write_models
from benchmarks.peft_suite.plugin import PACKAGE, LoreftPlugin, Outcome
from benchmarks.peft_suite.replaced import REPLACED

SHARED = ("testing_common", "testing_utils")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peft_suite")
    parser.add_argument("checkout", type=Path, help="PEFT's sources, with its tests")
    arguments, of_pytest = parser.parse_known_args()
    checkout = arguments.checkout.resolve()
    check_version(checkout)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tests(checkout / "tests", folder)
        write_models(folder)
        os.chdir(folder)  # Names of models are paths from here.
        sys.path.insert(0, name)
        plugin = LoreftPlugin()
        options = ["-q", "-p", "no:cacheprovider", "--tb=no", "--no-summary"]
        options += ["-W", "ignore", "--rootdir", name, PACKAGE, *of_pytest]
        status = pytest.main(options, plugins=[plugin])
        os.chdir("/")
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(status)
    counts, problems = judge(plugin.outcomes, EXPECTED, whole=not of_pytest)
    print_tables(plugin.outcomes, counts)
    for problem in problems:
        print("PROBLEM:", problem)
    return 1 if problems else 0


def check_version(checkout: Path) -> None:
    """End the run where the tests are not those of the installed PEFT."""
    source = checkout / "src" / "peft" / "__init__.py"
    if not (source.is_file() and (checkout / "tests" / "testing_common.py").is_file()):
        sys.exit(
            f"{checkout}: no src/peft and tests/testing_common.py here; give the path "
            "of PEFT's unpacked sdist, or of a checkout of its repository"
        )
    found = re.search(r'__version__ = "(.+)"', source.read_text())
    if found is None or found[1] != peft.__version__:
        version = found[1] if found else "an unknown version"
        sys.exit(
            f"{checkout}: tests of PEFT {version}, and {peft.__version__} is "
            "installed; give the tests of the installed version"
        )


def copy_tests(tests: Path, folder: Path) -> None:
    """Copy what is run to a package with a name that nothing else has."""
    package = folder / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    for name in (*SHARED, *REPLACED):
        # One file is newer than the oldest PEFT.
        if (tests / f"{name}.py").is_file():
            shutil.copy(tests / f"{name}.py", package)


def print_tables(outcomes: list[Outcome], counts: dict[str, int]) -> None:
    """Print the tables of docs/support.md."""
    versions = f"PEFT {peft.__version__}, transformers {transformers.__version__}"
    print(f"\n{versions}, torch {torch.__version__}\n")
    by_file = Counter((test.partition("::")[0], kind) for test, kind, _ in outcomes)
    print("| file | passed | failed | skipped by PEFT |\n|---|---|---|---|")
    for name in sorted({name for name, _ in by_file}):
        numbers = (by_file[name, kind] for kind in ("passed", "failed", "skipped"))
        print(f"| `{name}` |", " | ".join(map(str, numbers)), "|")
    print("\n| failed | why |\n|---|---|")
    for reason, count in counts.items():
        print(f"| {count} | {reason} |")


if __name__ == "__main__":
    sys.exit(main())
