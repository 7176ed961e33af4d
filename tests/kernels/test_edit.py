"""The Triton kernels, without a GPU: interpreted, and compiled for one."""

import pytest
import torch
import triton
from triton_runs import compile_kernel, run_checks, spilled

from axolotl_reft.kernels import dispatch, launch
from axolotl_reft.kernels import edit as kernels


@pytest.mark.slow
def test_the_kernels_compute_what_the_operations_do():
    run_checks("kernel_checks.py")


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
        compiled = compile_kernel(
            kernel, sizes, INTEGERS | dict.fromkeys(HIDDEN, dtype)
        )
        assert compiled.metadata.shared <= 48 * 1024
        assert spilled(compiled.asm["ptx"], tmp_path) == 0
