"""The serving kernel, without a GPU: interpreted, and compiled for one."""

import pytest
import torch
from triton_runs import compile_kernel, run_checks, spilled

from axolotl_reft.kernels import serving


@pytest.mark.slow
def test_the_kernel_computes_what_the_operations_do():
    run_checks("serving_kernel_checks.py")


class Launch:
    """In the place of a kernel: keeps what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.arg_names = kernel, kernel.arg_names

    def __getitem__(self, grid):
        self.grid = grid
        return self.call

    def call(self, *given, **sizes):
        self.given = dict(zip(self.arg_names, given, strict=False))
        self.sizes = sizes


@pytest.fixture
def launch(monkeypatch):
    kept = Launch(serving.edit_step)
    monkeypatch.setattr(serving, "edit_step", kept)
    return kept


def arguments(tokens, width, rank, dtype, has_residual, device="meta"):
    hidden_TD = torch.empty(tokens, width, dtype=dtype, device=device)
    wide, narrow = (torch.empty(8, rank, *w, device=device) for w in ([width], []))
    rows_T = torch.empty(4096, dtype=torch.int64, device=device)
    residual_TD = torch.empty_like(hidden_TD) if has_residual else None
    strengths_T1 = torch.empty(4097, device=device)
    rows = rows_T, rows_T, rows_T[:9], strengths_T1
    return hidden_TD, residual_TD, wide, narrow, wide, *rows


def test_a_launch_depends_on_shapes_alone(launch):
    """As it must in a graph that is captured once: on the meta device, no number can be
    read."""
    serving.launch_edit(*arguments(48, 70, 5, torch.float32, True))
    assert launch.grid == (48,)
    assert not any(isinstance(value, bool) for value in launch.given.values())
    assert launch.sizes == {
        "E": 8, "D": 70, "R": 5, "RP": 8, "BLOCK": 128, "HAS_RESIDUAL": True,
        "num_warps": 8,
    }  # fmt: skip


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize(
    ("rank", "dtype"), [(1, "fp16"), (8, "bf16"), (64, "fp32"), (256, "bf16")]
)
def test_the_kernel_compiles_and_keeps_to_the_registers(
    rank, dtype, has_residual, launch, tmp_path
):
    """Numbers that do not fit would go through memory."""
    serving.launch_edit(*arguments(16, 4096, rank, torch.float32, has_residual))
    types = dict.fromkeys(("rows", "edits", "starts"), "*i64")
    types |= dict.fromkeys(("hidden", "residual"), f"*{dtype}")
    types |= {name: "i32" for name in launch.arg_names if name.endswith(STRIDES)}
    compiled = compile_kernel(launch.kernel, launch.sizes, types)
    assert compiled.metadata.shared <= 48 * 1024
    assert spilled(compiled.asm["ptx"], tmp_path) == 0


STRIDES = ("_row", "_column")
