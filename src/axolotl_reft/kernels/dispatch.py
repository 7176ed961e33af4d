"""Chooses Triton's kernels or torch's operations, for edits of some of the rows.

Kernels run on NVIDIA's GPUs, up to rank 32, outside compiled graphs (where torch makes
its own). ``AXOLOTL_REFT_KERNELS=0`` turns them off.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch

from axolotl_reft.core.stacked_edits import Workspace

_MAX_RANK = 32


def workspace_for(device: torch.device, rank: int) -> type[Workspace]:
    """Return the workspace whose operations suit a device."""
    runs = device.type == "cuda" and torch.version.cuda is not None
    if device.type == "cpu":  # interpreted, as the tests have it
        runs = os.environ.get("TRITON_INTERPRET") == "1"
    return (runs and rank <= _MAX_RANK and _triton_workspace()) or Workspace


@cache
def _triton_workspace() -> type[Workspace] | None:
    """Return the kernels' workspace; None where Triton is missing or cannot run."""
    if os.environ.get("AXOLOTL_REFT_KERNELS") == "0" or find_spec("triton") is None:
        return None
    try:
        from triton.runtime import driver  # type: ignore[import-untyped]

        from axolotl_reft.kernels.launch import TritonWorkspace

        if torch.cuda.is_available():
            # Builds what every launch needs, with the machine's C compiler.
            driver.active.get_current_target()
    except Exception as error:
        warnings.warn(
            f"LoReFT: Triton cannot run its kernels here ({error}), so a step of few "
            "tokens is slower. Install a C compiler, or set AXOLOTL_REFT_KERNELS=0",
            stacklevel=2,
        )
        return None
    return TritonWorkspace
