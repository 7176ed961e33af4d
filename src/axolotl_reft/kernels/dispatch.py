"""Chooses between Triton's kernels and torch's operations.

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

MOST_RANK = 32


def workspace_for(device: torch.device, rank: int) -> type[Workspace]:
    """Return the workspace whose operations suit a device."""
    if rank <= MOST_RANK and _can_run_on(device):
        return _triton_workspace() or Workspace
    return Workspace


def _can_run_on(device: torch.device) -> bool:
    """On NVIDIA's GPUs, and interpreted on a CPU, as the tests have it."""
    if device.type == "cuda":
        return torch.version.cuda is not None
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_workspace() -> type[Workspace] | None:
    """The kernels' workspace; None where Triton is missing or cannot run them."""
    if os.environ.get("AXOLOTL_REFT_KERNELS") == "0" or find_spec("triton") is None:
        return None
    try:
        from axolotl_reft.kernels import edit
        from axolotl_reft.kernels.launch import TritonWorkspace

        if torch.cuda.is_available():
            edit.prepare()
    except Exception as error:
        warnings.warn(
            f"LoReFT: Triton cannot run its kernels here ({error}); torch's operations "
            "take their place, which compute the same and take longer where a batch "
            "has few tokens. With a C compiler installed Triton usually can; "
            "AXOLOTL_REFT_KERNELS=0 silences this",
            UserWarning,
            stacklevel=2,
        )
        return None
    return TritonWorkspace
