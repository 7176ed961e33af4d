"""A batch as samples of two parts, found on the host: what is computed depends on their
lengths.

Shapes: B batch, T tokens, N edited tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from axolotl_reft.prompts.batch import real_tokens, sample_starts
from axolotl_reft.prompts.kept import KeptPreambles, States
from axolotl_reft.prompts.samples import Sample, split_samples
from axolotl_reft.tuner.context import ForwardContext

# Preambles are computed together as long as padding is no more than this share.
_PADDING = 0.25
_HOST = torch.device("cpu")


class Preamble(NamedTuple):
    """The tokens of a sample before its first edited one; equal ones are computed once.

    Attributes:
        start: the position id of the first, from which they count on.
    """

    start: int
    ids: tuple[int, ...]

    @property
    def array(self) -> np.ndarray:
        return np.array(self.ids, dtype=np.int64)


@dataclass(frozen=True)
class TwoParts:
    """A batch as samples of two parts.

    Attributes:
        samples: those that have anything to compute.
        ids_BT, positions_BT: token ids and position ids of the batch.
        edited: flat indices (N,) of the batch, by adapter and side.
        preambles: of the samples, in their order.
        kept: states of the first tokens of each preamble, in pieces.
    """

    samples: list[Sample]
    ids_BT: Tensor
    positions_BT: Tensor
    edited: Mapping[str, list[Tensor]]
    preambles: list[Preamble]
    kept: dict[Preamble, list[States]]

    @cached_property
    def groups(self) -> list[list[Preamble]]:
        """Preambles of which tokens are missing, in groups of about as many."""
        missing = {p: count for p in self.kept if (count := self.missing(p))}
        groups: list[list[Preamble]] = []
        for preamble in sorted(missing, key=lambda p: -missing[p]):
            if groups:
                group = [*groups[-1], preamble]
                size = missing[group[0]] * len(group)
                if size - sum(missing[p] for p in group) <= _PADDING * size:
                    groups[-1] = group
                    continue
            groups.append([preamble])
        return groups

    def missing(self, preamble: Preamble) -> int:
        """Return how many of its tokens are not kept."""
        return len(preamble.ids) - sum(s.tokens for s in self.kept[preamble])

    @property
    def tokens_before(self) -> int:
        """Tokens to compute without gradients, padding included."""
        return sum(len(group) * self.missing(group[0]) for group in self.groups)

    @property
    def width(self) -> int:
        """Columns from the first edited token on, of the longest sample."""
        return max(sample.end - sample.split for sample in self.samples)

    @property
    def tokens_behind(self) -> int:
        """Tokens to compute with gradients, padding included."""
        return len(self.samples) * self.width


def split_batch(
    context: ForwardContext,
    inputs: Mapping[str, Any],
    adapters: list[str],
    keeps_samples_apart: bool,
    kept: KeptPreambles,
) -> TwoParts | None:
    """Return the two parts of a batch; None where nothing is before the edited tokens,
    or the tokens of a sample do not follow each other.

    Args:
        adapters: whose edited tokens count.
        keeps_samples_apart: the base does, in packed rows.
    """
    rows, columns = shape = context.shape
    edited: dict[str, list[Tensor]] = {}
    edited_S = torch.zeros(rows * columns + 1, dtype=torch.bool)
    for name in adapters:
        indices = context.indices(name)
        sides = indices.sides if indices is not None else ()
        on_host = [side_N.to(_HOST) for side_N in sides]
        edited[name] = [side_N[side_N < rows * columns] for side_N in on_host]
        for side_N in edited[name]:
            edited_S[side_N] = True
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    starts_BT = None
    if positions is None:
        positions = torch.arange(columns)[None]
    elif mask is None and keeps_samples_apart:
        starts_BT = sample_starts({"position_ids": positions.to(_HOST)}, shape)
    answer_BT = None
    if context.find_answers is not None:
        answer_BT = context.find_answers().expand(shape).to(_HOST) != 0
    real_BT, edited_BT = real_tokens(mask, shape, _HOST), edited_S[:-1].view(shape)
    samples = split_samples(edited_BT, real_BT, starts_BT, answer_BT)
    positions_BT = positions.to(_HOST).expand(shape)
    if not samples or not all(_counts_on(s, positions_BT) for s in samples):
        return None
    ids_BT = inputs["input_ids"].to(_HOST)
    preambles = [
        Preamble(
            int(positions_BT[row, begin]), tuple(ids_BT[row, begin:split].tolist())
        )
        for row, begin, split, _ in samples
    ]
    if not any(preamble.ids for preamble in preambles):
        return None
    found = {p: kept.find(p.start, p.array) for p in dict.fromkeys(preambles)}
    return TwoParts(samples, ids_BT, positions_BT, edited, preambles, found)


def _counts_on(sample: Sample, positions_BT: Tensor) -> bool:
    """Whether a sample's position ids count on from its first."""
    positions = positions_BT[sample.row, sample.begin : sample.end]
    return torch.equal(positions, positions[0] + torch.arange(len(positions)))
