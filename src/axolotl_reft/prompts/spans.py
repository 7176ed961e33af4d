"""Prompts of a batch: where each token stands in the prompt of its sample, and the
indices of those to edit.

Computed by torch on whole batches; padding, packing and earlier turns are masks.

Shapes: B batch, T tokens, N edited positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_reft.core.scatter import EditIndices
from axolotl_reft.prompts.positions import Positions


class PromptSpans(NamedTuple):
    """The place of each token of a batch in the prompt of its sample."""

    inside_BT: Tensor  # the token belongs to a prompt
    place_BT: Tensor  # its place in that prompt, from 0; meaningless where not inside
    length_BT: Tensor  # of that prompt

    def columns(self, start: int, stop: int) -> PromptSpans:
        """Return the spans of some columns; columns past the end are in no prompt."""
        beyond = max(stop - self.inside_BT.shape[1], 0)
        return PromptSpans(*(F.pad(t_BT[:, start:stop], (0, beyond)) for t_BT in self))

    def edited(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return masks (B, T) of the edited prefix and of the edited suffix.

        A side never takes more than half of the prompt, and what is cut off is not
        applied: the rule of pyreft's ``LoReftSupervisedDataset``, with which the paper
        was run. The two sides therefore never overlap.
        """
        half_BT = self.length_BT // 2
        prefix_BT = self.place_BT < half_BT.clamp(max=positions.first)
        suffix_BT = self.place_BT >= self.length_BT - half_BT.clamp(max=positions.last)
        return self.inside_BT & prefix_BT, self.inside_BT & suffix_BT

    def truncated(self, positions: Positions) -> Tensor:
        """Return the mask (B, T) of the prompts that are too short for a whole side."""
        longest = max(positions.first, positions.last)
        return self.inside_BT & (self.length_BT // 2 < longest)


def prompt_spans(
    real_BT: Tensor,
    starts_BT: Tensor | None = None,
    answer_BT: Tensor | None = None,
    every: bool = False,
) -> PromptSpans:
    """Find the prompts of every sample in a batch of rows.

    The first prompt of a sample runs from its first real token to its first answer
    token, or to its end. A later turn's prompt stands between two answers, or after
    the last.

    Args:
        real_BT: True for tokens, False for padding.
        starts_BT: True where a packed sample begins; None for one sample a row.
        answer_BT: True for tokens of answers; None if there are none.
        every: find the prompts of all turns, not the first turn's alone.
    """
    inside_BT = real_BT
    if answer_BT is not None and every:
        # a > b is a & ~b, as one operation.
        inside_BT = real_BT > answer_BT
        begins_BT = inside_BT > F.pad(inside_BT, (1, -1))
        starts_BT = begins_BT if starts_BT is None else begins_BT | starts_BT
    elif answer_BT is not None:
        inside_BT = real_BT & (count_in_sample(answer_BT, starts_BT) == 0)
    count_BT, start_BT, end_BT = _counts(inside_BT, starts_BT)
    return PromptSpans(inside_BT, count_BT - start_BT - 1, end_BT - start_BT)


def count_in_sample(mask_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
    """Return the running count of a mask, this token included, anew in each sample."""
    count_BT, start_BT, _ = _counts(mask_BT, starts_BT)
    return count_BT - start_BT


def any_in_sample(mask_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
    """Return whether a mask is True for any token of the same sample."""
    _, start_BT, end_BT = _counts(mask_BT, starts_BT)
    return end_BT > start_BT


def more_in_sample(mask_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
    """Return whether a mask is True for any later token of the same sample."""
    count_BT, _, end_BT = _counts(mask_BT, starts_BT)
    return end_BT > count_BT


def _counts(
    mask_BT: Tensor, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor | int, Tensor]:
    """Return a row's running counts: at each token, before its sample, and at the end
    of its sample."""
    count_BT = mask_BT.cumsum(1)
    total_B1 = count_BT[:, -1:]
    if starts_BT is None:
        return count_BT, 0, total_B1.expand_as(count_BT)
    # The count before a token; at its sample's start, and at the next sample's.
    earlier_BT = count_BT.add(mask_BT, alpha=-1)
    start_BT = (earlier_BT * starts_BT).cummax(1).values
    next_BT = torch.cat([earlier_BT.where(starts_BT, total_B1)[:, 1:], total_B1], 1)
    end_BT = next_BT.flip(1).cummin(1).values.flip(1)
    return count_BT, start_BT, end_BT


def edit_indices(
    spans: PromptSpans,
    positions: Positions,
    tied: bool,
    max_prompts: int | None = None,
    rows_B1: Tensor | None = None,
) -> EditIndices:
    """Return the indices into B·T that each intervention of a layer edits.

    Args:
        tied: prefix and suffix have one intervention.
        max_prompts: reserves slots for so many prompts, where counting the edited
            tokens would make the host wait for the device, or is impossible in a graph.
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
        if max_prompts is not None:
            slots = min(max_prompts * per_prompt, mask_BT.numel())
        sides.append(flat_indices(mask_BT, slots))
    return EditIndices(tuple(sides), may_be_unused=max_prompts is not None)


def flat_indices(mask_BT: Tensor, slots: int | None = None) -> Tensor:
    """Return the indices (N,) of the True entries of a mask laid flat, in order.

    ``slots`` reserves N, at least as many as there are entries; unused ones get B·T,
    one past the end.
    """
    mask = mask_BT.reshape(-1)
    if slots is None:
        return mask.nonzero().squeeze(1)
    places = torch.arange(mask.numel(), device=mask.device)
    # Slot 0 takes the places that the mask leaves out, and is dropped.
    slot = mask.cumsum(0) * mask
    out = places.new_full((slots + 1,), mask.numel())
    return out.scatter_(0, slot, places)[1:]
