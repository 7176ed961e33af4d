"""The relative size of an edit. Shapes: N positions, D hidden size."""

import torch
from torch import Tensor


def edit_sizes(before_ND: Tensor, after_ND: Tensor) -> Tensor:
    """Return ‖Φ(h)−h‖/‖h‖ of each hidden state, in float32 and without its last axis.

    Zero vectors, which unused reserved slots hold, give NaN.
    """
    before_ND = before_ND.detach().float()
    change_ND = after_ND.detach().float() - before_ND
    norm_N = before_ND.norm(dim=-1)
    return change_ND.norm(dim=-1) / norm_N.where(norm_N > 0, torch.nan)
