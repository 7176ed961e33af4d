"""Triton kernels without a GPU: interpreted in another process, or compiled for one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HERE = Path(__file__).parent
INTERPRETED = {"TRITON_INTERPRET": "1"}


def run_checks(name):
    """Run the checks of a file, on a GPU if there is one; in a process of their own:
    Triton decides at its import whether it interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / name)],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | ({} if torch.cuda.is_available() else INTERPRETED),
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def compile_kernel(kernel, sizes, types):
    """Compile for an A100 with arguments of these types (``*fp32`` where none is given)
    and the constants among ``sizes``."""
    constants = {n: v for n, v in sizes.items() if n in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32")
        for name in kernel.arg_names
    }
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(n),): v for n, v in constants.items()},
    )
    target = GPUTarget("cuda", 80, 32)
    return triton.compile(source, target, {"num_warps": sizes["num_warps"]})


def spilled(ptx, directory):
    """Bytes that the assembler had to put into memory."""
    path = directory / "kernel.ptx"
    path.write_text(ptx)
    ptxas = triton.knobs.nvidia.ptxas.path
    done = subprocess.run(
        [ptxas, "-v", "--gpu-name", "sm_80", path, "-o", directory / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(re.search(r"(\d+) bytes spill stores", done.stderr)[1])
