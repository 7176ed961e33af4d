"""Liger's kernels beside the adapter: the same training as without them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

pytestmark = pytest.mark.slow


def test_training_with_liger_s_kernels_is_training_without(tmp_path):
    script = Path(__file__).parents[1] / "liger_runs.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    results = json.loads((tmp_path / "results.json").read_text())
    plain, liger = results["plain"], results["liger"]
    assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= set(liger["kinds"])
    assert liger["forward"].startswith("liger_kernel.")
    assert not plain["forward"].startswith("liger_kernel.")
    assert liger["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    numbers, expected = (
        load_file(tmp_path / run / "adapter_model.safetensors")
        for run in ("liger", "plain")
    )
    assert_close(numbers, expected, atol=1e-3, rtol=1e-3)
