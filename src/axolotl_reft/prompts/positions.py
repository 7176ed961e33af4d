"""Which tokens are edited: the grammar ``f7+l7``, and prompts turned into indices.

Replaces pyreft's ``unit_locations``: nothing is computed per sample in Python, nothing
leaves the device, and padding, packing and the cache are read from the batch itself.
Torch only.

Shapes: B batch, T tokens, N edited positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_reft.errors import shown

# At most nine digits: torch's integers end at nineteen.
_GRAMMAR = re.compile(
    r"(?:f(?P<first>[1-9]\d{0,8}))?(?P<plus>\+)?(?:l(?P<last>[1-9]\d{0,8}))?", re.ASCII
)


@dataclass(frozen=True)
class Positions:
    """The prompt positions an intervention edits (arXiv 2404.03592, section 3.3).

    ``first`` and ``last`` count tokens from either end of the prompt, 0 for none;
    ``everywhere`` edits every token, prompt and answer, decode steps included.
    """

    first: int = 0
    last: int = 0
    everywhere: bool = False

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Read ``f<n>``, ``l<n>``, ``f<n>+l<m>`` or ``all``.

        Raises:
            ValueError: ``text`` is none of these.
        """
        if text == "all":
            return cls(everywhere=True)
        match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
        if match:
            first, last = int(match["first"] or 0), int(match["last"] or 0)
            if bool(match["plus"]) == bool(first and last) and (first or last):
                return cls(first, last)
        raise ValueError(
            f"positions: {shown(text)} is not understood. Write f<n> for the first n "
            "prompt tokens, l<n> for the last n, f<n>+l<m> for both (n, m from 1 to "
            "999999999), or all for every token: for example positions: f7+l7"
        )

    def __str__(self) -> str:
        if self.everywhere:
            return "all"
        sides = [f"f{self.first}"] * bool(self.first) + [f"l{self.last}"] * bool(
            self.last
        )
        return "+".join(sides)

    @property
    def two_sided(self) -> bool:
        """Whether the prefix and the suffix are both edited."""
        return bool(self.first and self.last)


@dataclass(frozen=True)
class PromptSpans:
    """Where each token of a batch stands in the prompt of its sample.

    Attributes:
        inside_BT: the token belongs to a prompt.
        rank_BT: its place in that prompt, from 0; meaningless where not inside.
        length_BT: the number of tokens of that prompt.
    """

    inside_BT: Tensor
    rank_BT: Tensor
    length_BT: Tensor

    def columns(self, start: int, stop: int) -> PromptSpans:
        """The same for some columns of a longer row; those past its end are outside."""
        beyond = max(stop - self.inside_BT.shape[1], 0)
        return PromptSpans(
            *(
                F.pad(tensor_BT[:, start:stop], (0, beyond))
                for tensor_BT in (self.inside_BT, self.rank_BT, self.length_BT)
            )
        )

    def edited(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """Masks (B, T) of the edited prefix and of the edited suffix.

        A side never takes more than half of the prompt, and what is cut off is not
        applied: the rule of pyreft's ``LoReftSupervisedDataset``, with which the paper
        was run. The two sides therefore never overlap.
        """
        half_BT = self.length_BT // 2
        prefix_BT = self.rank_BT < half_BT.clamp(max=positions.first)
        suffix_BT = self.rank_BT >= self.length_BT - half_BT.clamp(max=positions.last)
        return self.inside_BT & prefix_BT, self.inside_BT & suffix_BT

    def cut(self, positions: Positions) -> Tensor:
        """Mask (B, T) of the prompts that are too short for a whole side."""
        longest = max(positions.first, positions.last)
        return self.inside_BT & (self.length_BT // 2 < longest)


@dataclass(frozen=True)
class PromptRuns:
    """Which tokens of a batch belong to prompts, and where prompts begin.

    Attributes:
        inside_BT: the token belongs to a prompt.
        starts_BT: True where a packed sample begins; None for one sample a row.
        unbroken: the tokens of a prompt are neighbours, and a sample may have several
            prompts; otherwise it has one, in which padding may stand.
    """

    inside_BT: Tensor
    starts_BT: Tensor | None
    unbroken: bool

    def spans(self) -> PromptSpans:
        """Where each token stands in its prompt."""
        inside_BT, starts_BT = self.inside_BT, self.starts_BT
        if self.unbroken:
            begins_BT = inside_BT > F.pad(inside_BT, (1, -1))
            starts_BT = begins_BT if starts_BT is None else begins_BT | starts_BT
        count_BT, start_BT, end_BT = _counts(inside_BT, starts_BT)
        return PromptSpans(inside_BT, count_BT - start_BT - 1, end_BT - start_BT)

    def reserved_indices(self, positions: Positions, prompts: int) -> list[Tensor]:
        """For each side that is edited, the indices of :func:`flat_indices` for the
        mask of :meth:`PromptSpans.edited`, in another order, with a slot for every
        position of so many prompts; of unbroken ones. In few operations: on a GPU each
        is a launch that the first layer waits for.

        Args:
            prompts: P, at least as many as there are.
        """
        tokens = self.inside_BT.numel()
        padded_BT = F.pad(self.inside_BT, (1, 1))
        # Whether a token goes on with the prompt of the one before it; T + 1 columns.
        goes_on_BT = padded_BT[:, 1:] & padded_BT[:, :-1]
        if self.starts_BT is not None:
            goes_on_BT = goes_on_BT > F.pad(self.starts_BT, (0, 1))
        # For each token, whether it is its prompt's first, and its last; of all that
        # are, firsts and lasts take turns.
        edge_E = (self.inside_BT.unsqueeze(2) > goes_on_BT.unfold(1, 2, 1)).flatten()
        twice_E = torch.arange(edge_E.numel(), device=edge_E.device)
        slots = _compacted(edge_E, twice_E, 2 * prompts) >> 1
        first_P, last_P = slots.view(prompts, 2).unbind(1)
        most = max(positions.first, positions.last)
        place_K1 = torch.arange(most, device=edge_E.device).unsqueeze(1)
        # place >= length // 2, of a length of last - first + 1.
        beyond_KP = 2 * place_K1 >= last_P - first_P
        prefix_KP = first_P + place_K1[: positions.first]
        suffix_KP = last_P - place_K1[: positions.last]
        return [
            side.masked_fill_(beyond_KP[: len(side)], tokens).flatten()
            for side in (prefix_KP, suffix_KP)
            if len(side)
        ]


def prompt_runs(
    real_BT: Tensor,
    starts_BT: Tensor | None = None,
    answer_BT: Tensor | None = None,
    every: bool = False,
) -> PromptRuns:
    """Find the prompts of every sample in a batch of rows.

    The first prompt of a sample runs from its first real token to its first answer
    token; with no answer in sight, to its end. A later turn's prompt is what stands
    between two answers, or after the last.

    Args:
        real_BT: True for tokens, False for padding.
        starts_BT: True where a packed sample begins; None for one sample a row.
        answer_BT: True for tokens of answers; None if there are none.
        every: find the prompts of all turns, not the first turn's alone.
    """
    if answer_BT is None:
        return PromptRuns(real_BT, starts_BT, unbroken=False)
    if every:
        # a > b is a & ~b, as one operation.
        return PromptRuns(real_BT > answer_BT, starts_BT, unbroken=True)
    before_BT = count_in_sample(answer_BT, starts_BT) == 0
    return PromptRuns(real_BT & before_BT, starts_BT, unbroken=False)


def count_in_sample(mask_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
    """Running count of ``mask_BT``, this token included, anew in each sample."""
    count_BT, start_BT, _ = _counts(mask_BT, starts_BT)
    return count_BT - start_BT


def any_in_sample(mask_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
    """Whether ``mask_BT`` marks a token of the same sample."""
    _, start_BT, end_BT = _counts(mask_BT, starts_BT)
    return end_BT > start_BT


def _counts(
    mask_BT: Tensor, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor | int, Tensor]:
    """A row's running counts: at each token, before the first of its sample, and at the
    last."""
    count_BT = mask_BT.cumsum(1)
    total_B1 = count_BT[:, -1:]
    if starts_BT is None:
        return count_BT, 0, total_B1.expand_as(count_BT)
    # What the row counts before a token; at its sample's start, and at the next one's.
    earlier_BT = count_BT.add(mask_BT, alpha=-1)
    start_BT = (earlier_BT * starts_BT).cummax(1).values
    next_BT = torch.cat([earlier_BT.where(starts_BT, total_B1)[:, 1:], total_B1], 1)
    end_BT = next_BT.flip(1).cummin(1).values.flip(1)
    return count_BT, start_BT, end_BT


def flat_indices(mask_BT: Tensor, capacity: int | None = None) -> Tensor:
    """Indices (N,) of the True entries of a mask laid flat, in order.

    Args:
        capacity: N where the number of True entries must not be asked for (that would
            make the host wait for the device). Unused slots get B·T, one past the end.
            None counts.

    Returns:
        int64, on the mask's device.
    """
    mask = mask_BT.reshape(-1)
    if capacity is None:
        return mask.nonzero().squeeze(1)
    return _compacted(mask, torch.arange(mask.numel(), device=mask.device), capacity)


def _compacted(mask_E: Tensor, values_E: Tensor, capacity: int) -> Tensor:
    """The values at the True entries of a mask, in order, and then E (capacity,)."""
    # One slot before the others takes the values that the mask leaves out.
    slot_E = mask_E.cumsum(0) * mask_E
    out = values_E.new_full((capacity + 1,), mask_E.numel())
    return out.scatter_(0, slot_E, values_E)[1:]
