"""A batch as samples of two parts, found on the host: what is computed depends on their
lengths.

Shapes: B batch, T tokens, N edited tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from axolotl_reft.prompts.batch import real_tokens, sample_starts
from axolotl_reft.prompts.kept import KeptStates, States
from axolotl_reft.prompts.samples import Sample, split_samples
from axolotl_reft.tuner.context import ForwardContext

# Preambles are computed together as long as padding is no more than this share.
_PADDING = 0.25
_HOST = torch.device("cpu")


class TokenRun(NamedTuple):
    """Consecutive tokens from a sample's first on; equal ones are computed once.

    Attributes:
        start: the position id of the first, from which they count on.
    """

    start: int
    ids: tuple[int, ...]

    @property
    def tensor(self) -> Tensor:
        return torch.tensor(self.ids, dtype=torch.long)


@dataclass(frozen=True)
class HostBatch:
    """A batch as samples, on the host.

    Attributes:
        samples: those that have anything to compute.
        ids_BT, positions_BT: token ids and position ids.
        edited: flat indices (N,) of the batch, by adapter and side.
        answers_early: an answer's token may be predicted before the first edited one.
    """

    samples: list[Sample]
    ids_BT: Tensor
    positions_BT: Tensor
    edited: Mapping[str, list[Tensor]]
    answers_early: bool

    @classmethod
    def read(
        cls,
        context: ForwardContext,
        inputs: Mapping[str, Any],
        adapters: list[str],
        keeps_samples_apart: bool,
    ) -> HostBatch | None:
        """Read a forward's batch; None where the tokens of a sample do not follow each
        other, or padding predicts a trained one.

        Args:
            adapters: whose edited tokens count; all are, where they edit all.
            keeps_samples_apart: the base does, in packed rows.
        """
        shape, edited = context.shape, _edited_tokens(context, adapters)
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        starts_BT = None
        if positions is None:
            positions = torch.arange(shape[1])[None]
        elif mask is None and keeps_samples_apart:
            starts_BT = sample_starts({"position_ids": positions.to(_HOST)}, shape)
        answer_BT = None
        if context.on_host is not None:
            answer_BT = context.on_host.tensors["labels"] != -100
        elif context.find_answers is not None:
            answer_BT = context.find_answers().expand(shape).to(_HOST) != 0
        edited_BT = _marked(shape, [side_N for e in edited.values() for side_N in e])
        real_BT = real_tokens(mask, shape, _HOST)
        samples = split_samples(edited_BT, real_BT, starts_BT, answer_BT)
        positions_BT = positions.to(_HOST).expand(shape)
        if not samples or not all(_counts_on(s, positions_BT) for s in samples):
            return None
        if answer_BT is not None and _is_predicted_by_others(answer_BT, samples):
            return None
        early = answer_BT is None or any(
            answer_BT[s.row, s.begin + 1 : s.split + 1].any() for s in samples
        )
        ids_BT = inputs["input_ids"].to(_HOST)
        return cls(samples, ids_BT, positions_BT, edited, early)

    def run(self, row: int, start: int, stop: int) -> TokenRun:
        """Return the tokens in some columns of a row."""
        ids = tuple(self.ids_BT[row, start:stop].tolist())
        return TokenRun(int(self.positions_BT[row, start]), ids)


@dataclass(frozen=True)
class TwoParts:
    """The two parts of a batch.

    Attributes:
        preambles: of the samples, in their order.
        needs_hidden: their last hidden states are asked for; else keys and values are
            enough.
        kept: states of the first tokens of each preamble, in pieces.
    """

    batch: HostBatch
    preambles: list[TokenRun]
    needs_hidden: bool
    kept: dict[TokenRun, list[States]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, batch: HostBatch, kept: KeptStates, needs_hidden: bool = True
    ) -> TwoParts | None:
        """Split a batch; None where nothing is before the edited tokens."""
        preambles = [batch.run(s.row, s.begin, s.split) for s in batch.samples]
        if not any(preamble.ids for preamble in preambles):
            return None
        parts = cls(batch, preambles, needs_hidden)
        for preamble in dict.fromkeys(preambles):
            root = parts.root(preamble)
            parts.kept[preamble] = kept.find(root, preamble.tensor)
        return parts

    def root(self, preamble: TokenRun) -> Hashable:
        """Return where in the tree a preamble's states are kept."""
        return preamble.start, self.needs_hidden

    @cached_property
    def groups(self) -> list[list[TokenRun]]:
        """Preambles of which tokens are missing, in groups of about as many."""
        return grouped({p: n for p in self.kept if (n := self.missing(p))})

    def missing(self, preamble: TokenRun) -> int:
        """Return how many of its tokens are not kept."""
        return len(preamble.ids) - sum(s.tokens for s in self.kept[preamble])

    @property
    def tokens_before(self) -> int:
        """Tokens to compute without gradients, padding included."""
        return sum(len(group) * self.missing(group[0]) for group in self.groups)

    @property
    def width(self) -> int:
        """Columns from the first edited token on, of the longest sample."""
        return max(sample.end - sample.split for sample in self.batch.samples)

    @property
    def tokens_behind(self) -> int:
        """Tokens to compute with gradients, padding included."""
        return len(self.batch.samples) * self.width


def grouped(counts: Mapping[TokenRun, int]) -> list[list[TokenRun]]:
    """Return runs in groups, that with the most tokens first, which take little padding
    as rows of one batch."""
    groups: list[list[TokenRun]] = []
    for run in sorted(counts, key=lambda r: -counts[r]):
        group = [*groups[-1], run] if groups else []
        size = counts[group[0]] * len(group) if group else 0
        if group and size - sum(counts[r] for r in group) <= _PADDING * size:
            groups[-1] = group
        else:
            groups.append([run])
    return groups


def _edited_tokens(
    context: ForwardContext, adapters: list[str]
) -> dict[str, list[Tensor]]:
    """Return the flat indices (N,) that each adapter edits, by side."""
    size = context.shape[0] * context.shape[1]
    edited = {}
    for name in adapters:
        if context.adapters[name].positions.everywhere:
            edited[name] = [torch.arange(size)]
            continue
        if context.on_host is not None and name in context.on_host.indices:
            edited[name] = list(context.on_host.indices[name])
            continue
        indices = context.indices(name)
        sides = indices.sides if indices is not None else ()
        on_host = [side_N.to(_HOST) for side_N in sides]
        edited[name] = [side_N[side_N < size] for side_N in on_host]
    return edited


def _marked(shape: tuple[int, int], indices: list[Tensor]) -> Tensor:
    marked_BT = torch.zeros(shape, dtype=torch.bool)
    for index_N in indices:
        marked_BT.view(-1)[index_N] = True
    return marked_BT


def _is_predicted_by_others(answer_BT: Tensor, samples: list[Sample]) -> bool:
    """Whether an answer's token stands behind one of no sample, as a row's first behind
    padding: its loss counts too."""
    computed_BT = torch.zeros_like(answer_BT)
    for row, begin, _, end in samples:
        computed_BT[row, begin:end] = True
    return bool((answer_BT[:, 1:] > computed_BT[:, :-1]).any())


def _counts_on(sample: Sample, positions_BT: Tensor) -> bool:
    """Whether a sample's position ids count on from its first."""
    positions = positions_BT[sample.row, sample.begin : sample.end]
    return torch.equal(positions, positions[0] + torch.arange(len(positions)))
