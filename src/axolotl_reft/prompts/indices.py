"""Edited tokens of a batch as flat indices, for the interventions of a layer.

Shapes: B batch, T tokens, N edited positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_reft.core.scatter import EditIndices
from axolotl_reft.prompts.positions import Positions
from axolotl_reft.prompts.spans import PromptSpans


def edit_indices(
    spans: PromptSpans,
    positions: Positions,
    tied: bool,
    most_prompts: int | None = None,
    rows_B1: Tensor | None = None,
) -> EditIndices:
    """Return the indices into B·T that each intervention of a layer edits.

    Args:
        tied: prefix and suffix have one intervention.
        most_prompts: reserves slots for so many prompts, where counting the edited
            tokens would make the host wait for the device, or is impossible in a graph.
            None counts.
        rows_B1: True in the rows that are meant; None for all.
    """
    prefix_BT, suffix_BT = spans.edited(positions)
    masks = [(prefix_BT, positions.first), (suffix_BT, positions.last)]
    if tied or not positions.two_sided:
        masks = [(prefix_BT | suffix_BT, positions.first + positions.last)]
    sides = []
    for mask_BT, per_prompt in masks:
        if rows_B1 is not None:
            mask_BT = mask_BT & rows_B1
        slots = None
        if most_prompts is not None:
            slots = min(most_prompts * per_prompt, mask_BT.numel())
        sides.append(flat_indices(mask_BT, slots))
    return EditIndices(tuple(sides), may_be_unused=most_prompts is not None)


def flat_indices(mask_BT: Tensor, slots: int | None = None) -> Tensor:
    """Return the indices (N,) of the True entries of a mask laid flat, in order.

    Args:
        slots: N, at least as many as there are entries; unused ones get B·T, one past
            the end. None counts the entries.
    """
    mask = mask_BT.reshape(-1)
    if slots is None:
        return mask.nonzero().squeeze(1)
    places = torch.arange(mask.numel(), device=mask.device)
    # One slot before the others takes the places that the mask leaves out.
    slot = mask.cumsum(0) * mask
    out = places.new_full((slots + 1,), mask.numel())
    return out.scatter_(0, slot, places)[1:]
