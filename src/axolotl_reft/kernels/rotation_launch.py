"""Rotations by the kernels of rotation_kernels.py.

Shapes: K matrices, D hidden size, R rank, N = 2R reflections, NP and RP those padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from axolotl_reft.kernels.launch import dot_size, on

# More entries of Y at once take more shared memory than some GPUs have.
_ENTRIES = 1024


def can_be_addressed(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels can read these where they lie."""
    device = tensors[0].device
    return all(
        one.dtype is torch.float32 and one.device == device and one.is_contiguous()
        for one in tensors
    )


def rotate(
    vectors: Sequence[Tensor], bases: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What rotation.py's function of this name returns first, and what
    :func:`rotate_backward` asks for; of what :func:`can_be_addressed`."""
    from axolotl_reft.kernels import rotation as rotation_kernels

    device, count = vectors[0].device, len(vectors)
    width, rank = vectors[0].shape
    how = sizes(width, rank)
    where = tuple(one.data_ptr() for one in (*bases, *vectors))
    addresses = _addresses(device, where)
    r_KRD = vectors[0].new_empty(count, rank, width)
    t_inverse_KNN = _wide(device, count, how["NP"], how["NP"])
    c_KNR = _wide(device, count, how["NP"], how["RP"])
    with on(device):
        rotation_kernels.rotate[(count,)](addresses, r_KRD, t_inverse_KNN, c_KNR, **how)
    # The vectors and bases too, which backward reads again: autograd refuses those that
    # have changed.
    return r_KRD, (addresses, t_inverse_KNN, c_KNR, *vectors, *bases)


def rotate_backward(kept: Sequence[Tensor], grad_KRD: Tensor) -> Tensor:
    """What rotation.py's function of this name returns."""
    from axolotl_reft.kernels import rotation as rotation_kernels

    addresses, t_inverse_KNN, c_KNR, *_ = kept
    count, rank, width = grad_KRD.shape
    grad_KDR = grad_KRD.new_empty(count, width, rank)
    with on(grad_KRD.device):
        rotation_kernels.rotate_backward[(count,)](
            addresses, grad_KRD.contiguous(), t_inverse_KNN, c_KNR,
            torch.empty_like(t_inverse_KNN), torch.empty_like(c_KNR), grad_KDR,
            **sizes(width, rank),
        )  # fmt: skip
    return grad_KDR


def sizes(width: int, rank: int) -> dict[str, int]:
    """What the kernels are compiled for."""
    padded = dot_size(2 * rank)
    return {
        "D": width,
        "R": rank,
        "RP": dot_size(rank),
        "NP": padded,
        "BLOCK": _ENTRIES // padded,
        "num_warps": 4,
    }


def _wide(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=device)


@lru_cache(maxsize=64)
def _addresses(device: torch.device, where: tuple[int, ...]) -> Tensor:
    """On the device; the same from step to step, as tensors stay where they are."""
    table = torch.tensor(where)
    if device.type == "cuda":  # from pinned memory the host need not wait
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
