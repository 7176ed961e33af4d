"""How far an adapter moves the hidden states it edits: ‖Φ(h)−h‖/‖h‖.

Shapes: N positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from axolotl_reft.tuner.layer import LoreftDecoderLayer


def edit_sizes(before_ND: Tensor, after_ND: Tensor) -> Tensor:
    """‖Φ(h)−h‖/‖h‖ of each vector, in float32.

    Returns:
        The leading shape of the inputs; NaN for zero vectors, which is what slots that
        are reserved and not used hold.
    """
    before_ND = before_ND.detach().float()
    change_ND = after_ND.detach().float() - before_ND
    length_N = before_ND.norm(dim=-1)
    return change_ND.norm(dim=-1) / length_N.where(length_N > 0, torch.nan)


def named_interventions(
    model: nn.Module, adapter: str
) -> Iterator[tuple[int, int, LoreftDecoderLayer, nn.Module]]:
    """Layer number, side, wrapper and intervention of an adapter."""
    for path, module in model.named_modules():
        if isinstance(module, LoreftDecoderLayer):
            for side, container in enumerate((module.intv_0, module.intv_1)):
                if adapter in container:
                    yield int(path.rpartition(".")[2]), side, module, container[adapter]


def nan_mean(values: Tensor) -> float:
    """The mean without NaN; NaN of nothing."""
    return float(torch.nanmean(values)) if values.numel() else float("nan")
