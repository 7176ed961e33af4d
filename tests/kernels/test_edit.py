"""The Triton kernels, without a GPU: interpreted, and compiled for one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from axolotl_reft.kernels import dispatch, launch
from axolotl_reft.kernels import edit as kernels

HERE = Path(__file__).parents[1]
INTERPRETED = {"TRITON_INTERPRET": "1"}


@pytest.mark.slow
def test_the_kernels_compute_what_the_operations_do():
    """In a process of its own: Triton decides at its import whether it interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / "kernel_checks.py")],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | ({} if torch.cuda.is_available() else INTERPRETED),
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_without_a_compiler_or_a_driver_operations_take_their_place(monkeypatch):
    """As here, where Triton finds no driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(fail))
    with pytest.warns(UserWarning, match="Triton cannot run its kernels here .no gcc"):
        assert dispatch._triton_workspace.__wrapped__() is None


def fail(_):
    raise RuntimeError("no gcc")


INTEGERS = {"index": "*i64", "rows_0": "i32", "rows_1": "i32", "tokens": "i32"}
HIDDEN = ("x", "out", "taken", "grad")


def signature(kernel, constants, dtype):
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in HIDDEN:
            kinds[name] = dtype
        else:
            kinds[name] = INTEGERS.get(name, "*fp32")
    return kinds


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


@pytest.mark.parametrize(("rank", "dtype"), [(8, "*bf16"), (32, "*fp32")])
@pytest.mark.parametrize("rows", [56, 500])
def test_the_kernels_compile_and_keep_to_the_registers(rank, rows, dtype, tmp_path):
    """For an A100; numbers that do not fit would go through memory."""
    options = dict.fromkeys(("HAS_M", "HAS_P", "KEEP"), True)
    for kernel, how, has_b in (
        (kernels.edit_rows, launch.by_rows, True),
        (kernels.edit_rows, launch.by_rows, False),
        (kernels.edit_weights_backward, launch.by_columns, False),
    ):
        _, sizes = how([rows, rows], 4096, rank)
        sizes |= {"D": 4096, "R": rank, "HAS_B": has_b, **options}
        compiled = compile_(kernel, sizes, lambda k, c: signature(k, c, dtype))
        assert compiled.metadata.shared <= 48 * 1024
        assert spilled(compiled.asm["ptx"], tmp_path) == 0


def compile_(kernel, sizes, signature):
    constants = {n: v for n, v in sizes.items() if n in kernel.arg_names}
    source = ASTSource(
        kernel,
        signature(kernel, constants),
        {(kernel.arg_names.index(n),): v for n, v in constants.items()},
    )
    target = GPUTarget("cuda", 80, 32)
    return triton.compile(source, target, {"num_warps": sizes["num_warps"]})
