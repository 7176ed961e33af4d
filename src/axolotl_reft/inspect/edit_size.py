"""The relative size of an edit, ‖Φ(h)−h‖/‖h‖, and the interventions that make edits.

Shapes: N positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from axolotl_reft.tuner.layer import LoreftDecoderLayer


def edit_sizes(before_ND: Tensor, after_ND: Tensor) -> Tensor:
    """Return ‖Φ(h)−h‖/‖h‖ of each hidden state, in float32 and without its last axis.

    Zero vectors, which unused reserved slots hold, give NaN.
    """
    before_ND = before_ND.detach().float()
    change_ND = after_ND.detach().float() - before_ND
    norm_N = before_ND.norm(dim=-1)
    return change_ND.norm(dim=-1) / norm_N.where(norm_N > 0, torch.nan)


def named_interventions(
    model: nn.Module, adapter: str
) -> Iterator[tuple[int, int, LoreftDecoderLayer, nn.Module]]:
    """Yield the layer number, side, wrapper and intervention of an adapter."""
    for path, module in model.named_modules():
        if isinstance(module, LoreftDecoderLayer):
            for side, container in enumerate((module.intv_0, module.intv_1)):
                if adapter in container:
                    yield int(path.rpartition(".")[2]), side, module, container[adapter]
