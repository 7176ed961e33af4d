"""A backbone's forward in two parts, and a forward whose lower layers are given.

Shapes: B batch, T tokens, S = B·T, D hidden size, N tokens; M samples, of W columns
from the first edited token on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_reft.prompts.kept import KeptStates, States
from axolotl_reft.tuner.context import ForwardContext, ModelState
from axolotl_reft.tuner.lower_layers import LowerLayers
from axolotl_reft.tuner.preamble_cache import PreambleCache, StopForwardError
from axolotl_reft.tuner.two_parts import HostBatch, TokenRun, TwoParts, grouped

# What transformers' layers read: a cache that gives the same again may stay when
# checkpointing computes them anew.
_KEEPS_CACHE = "_can_checkpoint_with_cache"


@dataclass(frozen=True, eq=False)
class PartialForward:
    """Computes parts of forwards of a backbone.

    Attributes:
        forward: the backbone's own.
        layers: all of the backbone, without wrappers.
        windows: of their caches.
        cache_name: the argument of the forward that takes a cache.
        others: a forward's further arguments.
    """

    backbone: PreTrainedModel
    forward: Callable[..., Any]
    layers: list[nn.Module]
    windows: list[int | None]
    cache_name: str
    state: ModelState
    others: Mapping[str, Any] = field(default_factory=dict)

    def in_two_parts(
        self, parts: TwoParts, passes: int, context: ForwardContext, kept: KeptStates
    ) -> Any:
        """Return the backbone's output, and keep what is new.

        Args:
            passes: for the first part, at least; other processes need as many.
        """
        states = {preamble: list(found) for preamble, found in parts.kept.items()}
        with self._cached_under_checkpointing():
            for group in parts.groups:
                before, stops = [states[p] for p in group], not parts.needs_hidden
                new = self._compute_before(before, group, stops)
                for preamble, computed in zip(group, new, strict=True):
                    states[preamble].append(computed)
                    kept.add(parts.root(preamble), preamble.tensor, computed)
            for _ in range(passes - len(parts.groups)):
                self._compute_before([[]], [TokenRun(0, (0,))], stops=False)
            rows = [states[preamble] for preamble in parts.preambles]
            output, source_N, target_N = self._compute_behind(rows, parts, context)
        h_MWD = output.last_hidden_state
        joined_BTD = _laid_out(parts.batch, rows, h_MWD)
        h_ND = h_MWD.flatten(0, 1).index_select(0, source_N.to(h_MWD.device))
        joined_SD = joined_BTD.flatten(0, 1)
        joined_SD = joined_SD.index_copy(0, target_N.to(h_MWD.device), h_ND)
        return type(output)(last_hidden_state=joined_SD.view(joined_BTD.shape))

    def below(
        self, batch: HostBatch, lower: LowerLayers, kept: KeptStates
    ) -> Tensor | None:
        """Return the hidden states (B, T, D) behind the lower layers, and keep what is
        new; zeros at padding. None where layers return more than a vector a token."""
        runs = [batch.run(s.row, s.begin, s.end) for s in batch.samples]
        found = {r: kept.find((lower.count, r.start), r.tensor) for r in runs}
        missing = {
            run: len(run.ids)
            for run, pieces in found.items()
            if sum(states.tokens for states in pieces) < len(run.ids)
        }
        for group in grouped(missing):
            counts = [len(run.ids) for run in group]
            call = partial(self._compute_rows, None, group, [0] * len(group), counts)
            hidden = lower.compute(call)
            if hidden.ndim != 3 or hidden.shape[:2] != (len(group), counts[0]):
                return None
            for row, run in enumerate(group):
                states = States([], [], hidden[row, : len(run.ids)])
                found[run] = [states]
                kept.add((lower.count, run.start), run.tensor, states)
        like = found[runs[0]][0].hidden
        return _laid_out(batch, [found[run] for run in runs], like)

    def _compute_before(
        self, rows: list[list[States]], group: list[TokenRun], stops: bool
    ) -> list[States]:
        """Return the states of the tokens that are missing behind those before them;
        with ``stops``, hidden states of no size."""
        cache = PreambleCache(rows, self.windows, stops)
        done = [sum(states.tokens for states in pieces) for pieces in rows]
        counts = [len(run.ids) - n for run, n in zip(group, done, strict=True)]
        try:
            output = self._compute_rows(cache, group, done, counts)
            hidden = output.last_hidden_state
        except StopForwardError:
            hidden = torch.empty(len(group), max(counts), 0)
        return cache.computed(counts, hidden)

    def _compute_rows(
        self,
        cache: PreambleCache | None,
        group: list[TokenRun],
        done: list[int],
        counts: list[int],
    ) -> Any:
        """Return the output of the last tokens of runs, without edits or gradients."""
        ids = torch.zeros(len(group), max(counts), dtype=torch.long)
        for row, (run, count) in enumerate(zip(group, counts, strict=True)):
            ids[row, :count] = torch.tensor(run.ids[-count:])
        starts = torch.tensor([r.start + n for r, n in zip(group, done, strict=True)])
        positions = starts[:, None] + torch.arange(ids.shape[1])
        # As in a decode step, nothing is edited.
        shape = ids.shape[0], ids.shape[1]
        context = ForwardContext(shape, self.state.adapters, None)
        self.state.thread.context = context
        with torch.no_grad():
            return self._call(cache, ids, positions, done, counts)

    def _compute_behind(
        self, rows: list[list[States]], parts: TwoParts, context: ForwardContext
    ) -> tuple[Any, Tensor, Tensor]:
        """Return the output (M, W) of the tokens behind the preambles, and its tokens'
        flat indices (N,) there and in the batch."""
        cache, batch = PreambleCache(rows, self.windows), parts.batch
        width, columns = parts.width, context.shape[1]
        shape = len(rows), width
        ids, positions = torch.zeros(2, *shape, dtype=torch.long)
        counts = [sample.end - sample.split for sample in batch.samples]
        # The index behind the preambles of each token of the batch.
        new_S = torch.full((batch.ids_BT.numel(),), -1)
        for number, (row, _, split, end) in enumerate(batch.samples):
            size, first = end - split, number * width
            ids[number, :size] = batch.ids_BT[row, split:end]
            positions[number, :size] = batch.positions_BT[row, split:end]
            old = slice(row * columns + split, row * columns + end)
            new_S[old] = torch.arange(first, first + size)
        given = {
            name: [new_S[side_N].to(self.backbone.device) for side_N in sides]
            for name, sides in batch.edited.items()
        }
        self.state.thread.context = ForwardContext(
            *(shape, context.adapters, lambda turns: None, cache.width),
            given=given,
            strengths=context.strengths,
            prepared=context.prepared,
        )
        done = [len(preamble.ids) for preamble in parts.preambles]
        output = self._call(cache, ids, positions, done, counts)
        target_N = (new_S >= 0).nonzero().flatten()
        return output, new_S[target_N], target_N

    def _call(
        self,
        cache: PreambleCache | None,
        ids: Tensor,
        positions: Tensor,
        done: list[int],
        counts: list[int],
    ) -> Any:
        """Return the backbone's output of rows of so many tokens behind so many."""
        before, device = cache.width if cache else 0, self.backbone.device
        mask = None
        if set(done) != {before} or set(counts) != {ids.shape[1]}:
            columns = torch.arange(before + ids.shape[1])
            starts = before - torch.tensor(done)[:, None]
            stops = before + torch.tensor(counts)[:, None]
            mask = ((columns >= starts) & (columns < stops)).long().to(device)
        return self.forward(
            **self.others,
            **{self.cache_name: cache},
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=positions.to(device),
            use_cache=False,
        )

    @contextmanager
    def _cached_under_checkpointing(self) -> Iterator[None]:
        """Let layers that are checkpointed keep their cache."""
        for layer in self.layers:
            # Patch: checkpointing would drop it.
            layer.__dict__[_KEEPS_CACHE] = True
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.__dict__[_KEEPS_CACHE]


def _laid_out(batch: HostBatch, rows: list[list[States]], like: Tensor) -> Tensor:
    """Return the hidden states of samples' first tokens in the batch (B, T, D); zeros
    elsewhere, and for those of no size."""
    h_BTD = like.new_zeros(*batch.ids_BT.shape, like.shape[-1])
    for sample, pieces in zip(batch.samples, rows, strict=True):
        column = sample.begin
        for piece in pieces:
            if piece.hidden.shape[-1]:
                h_BTD[sample.row, column : column + piece.tokens] = piece.hidden
            column += piece.tokens
    return h_BTD
