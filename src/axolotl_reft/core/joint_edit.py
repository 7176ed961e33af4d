"""The edits of prefix and suffix as one, for compiled graphs.

A graph's time with few tokens is its number of kernels, and products of matrices are
kernels of their own. The two sides' numbers are put side by side, the products taken
for the rows of both, and what a row has of the other side's is set to zero: half the
products, for twice their FLOPs, which are few. Torch only.

Shapes: N rows of both sides, D hidden size, K the two ranks together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def can_join(interventions: Sequence[Any]) -> bool:
    """Whether :func:`joint_edit` takes these, of interventions.py's."""
    return len(interventions) == 2 and all(
        one.affine and one.unwatched and one.on_edit is None for one in interventions
    )


def joint_edit(interventions: Sequence[Any], prefixes: int, h_ND: Tensor) -> Tensor:
    """What the first makes of the first rows and the second of the others.

    Args:
        interventions: two that :func:`can_join` took.
        prefixes: how many rows are the first's.
        h_ND: hidden states.

    Returns:
        (N, D), in their dtype.
    """
    first, _ = interventions
    with torch.autocast(h_ND.device.type, enabled=False):
        wide_ND = h_ND.float()
        p_KD = torch.cat([one.matrix_RD() for one in interventions])
        source_NK = torch.cat([one.bias.float() for one in interventions])
        if first.has_weight:
            m_KD = torch.cat([one.weight.float() for one in interventions])
            m_KD = m_KD - p_KD if first.subtracts else m_KD
            source_NK = F.linear(wide_ND, m_KD, source_NK)
        elif first.subtracts:
            source_NK = source_NK - F.linear(wide_ND, p_KD)
        rows_N1 = torch.arange(h_ND.shape[0], device=h_ND.device).unsqueeze(1)
        columns_K = torch.arange(p_KD.shape[0], device=h_ND.device)
        own_NK = (rows_N1 < prefixes) ^ (columns_K >= first.rank)
        edited_ND = torch.addmm(wide_ND, source_NK.where(own_NK, 0), p_KD)
    return edited_ND.to(h_ND.dtype)
