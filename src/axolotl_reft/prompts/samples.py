"""Samples of a batch, and the first of their tokens that an adapter edits.

The tokens before it are the frozen base's alone.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """A sample's columns in its row: those from ``begin`` to ``split`` are before the
    first edited token, those from ``split`` to ``end`` are the others."""

    row: int
    begin: int
    split: int
    end: int


def split_samples(
    edited_BT: Tensor,
    real_BT: Tensor,
    starts_BT: Tensor | None,
    answer_BT: Tensor | None,
) -> list[Sample] | None:
    """Return the samples with their first edited columns; None where a sample has
    padding inside of it.

    A sample of which nothing is edited has no part before; where it has no answer
    either, as the padded end of a packed row, it is left out.

    Args:
        edited_BT: True for edited tokens; real_BT: False for padding.
        starts_BT: True where a packed sample begins; None for one sample a row.
        answer_BT: True for tokens of answers; None where they are unknown.
    """
    samples = []
    width = real_BT.shape[1]
    for row in range(len(real_BT)):
        bounds = [0, width]
        if starts_BT is not None:
            bounds = sorted({0, *starts_BT[row].nonzero().flatten().tolist(), width})
        for left, right in zip(bounds, bounds[1:], strict=False):
            columns = real_BT[row, left:right].nonzero().flatten()
            if not len(columns):
                continue
            begin, end = left + int(columns[0]), left + int(columns[-1]) + 1
            if end - begin != len(columns):
                return None
            edited = edited_BT[row, begin:end]
            split = begin + int(edited.to(torch.uint8).argmax())
            if not edited.any():
                if answer_BT is not None and not answer_BT[row, begin:end].any():
                    continue
                split = begin
            samples.append(Sample(row, begin, split, end))
    return samples
