"""A forward in two parts: the tokens before the first edited one, and the others.

With ``positions: l<m>`` nothing before a sample's first edited token, its preamble,
depends on what is trained. Its hidden states, keys and values are the frozen base's:
they are computed without gradients, or kept from an earlier forward, and the rest is
computed behind them. The last hidden states of both parts together are those of the
forward as a whole, and so are all gradients.

Shapes: B batch, T tokens, S = B·T, N tokens; M samples, of W columns from the first
edited token on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from axolotl_reft.prompts.kept import KeptPreambles, States
from axolotl_reft.tuner.context import ForwardContext, ModelState
from axolotl_reft.tuner.frozen_base import Fingerprint, saves_time
from axolotl_reft.tuner.frozen_reasons import (
    NOT_ASKED,
    OF_THE_HEAD,
    OF_TOKENS,
    Inputs,
    why_not,
    why_whole,
)
from axolotl_reft.tuner.packing import what_joins_samples
from axolotl_reft.tuner.preamble_cache import PreambleCache, windows_of
from axolotl_reft.tuner.two_parts import Preamble, TwoParts, split_batch

# What transformers' layers read: a cache that gives the same again may stay when
# checkpointing computes them anew.
_KEEPS_CACHE = "_can_checkpoint_with_cache"
_NOT_WORTH = "too few tokens are before the first edited one"
_NAMES = "__module__", "__name__", "__qualname__", "__doc__"


class FrozenPrompt:
    """Computes the forwards of a model's backbone in two parts, where that is exact.

    Args:
        layers: the path of the list of layers.
        prefix: of the names of adapters' parameters.
        when: ``auto`` where it saves time as well; True wherever it can be, and an
            error elsewhere.
        tell: called with what was decided, and why, once for each reason.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        backbones: list[PreTrainedModel],
        layers: str,
        state: ModelState,
        prefix: str,
        when: str | bool,
        kept: KeptPreambles,
        tell: Callable[[str], None],
    ) -> None:
        self.kept, self.when = kept, when
        self._backbone, self._state, self._prefix = backbones[0], state, prefix
        self._layers: Any = model.get_submodule(layers)
        self._config: Any = model.config.get_text_config()
        self._joins_samples = what_joins_samples(model)
        self._tell, self._told = tell, set[str]()
        self._base: Fingerprint | None = None
        self._forward = self._backbone.forward
        self._names = list(inspect.signature(self._forward).parameters)
        # Of the instance: accelerate puts its own there.
        self._before = self._backbone.__dict__.get("forward")
        self.reason = why_not(model, backbones, state)
        if self.reason:
            self._explain(self.reason)
        else:
            self._windows = windows_of(self._config)

    def attach(self) -> None:
        # Patch: a hook can change what a forward is given, but not have two of it run.
        forward = update_wrapper(partial(self.forward), self._forward, _NAMES)
        self._backbone.__dict__["forward"] = forward

    def detach(self) -> None:
        del self._backbone.__dict__["forward"]
        if self._before is not None:
            self._backbone.__dict__["forward"] = self._before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the backbone's output, computed in one part or in two."""
        context = self._state.thread.context
        if context is None or self.reason or torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        base = Fingerprint(self._backbone, self._prefix)
        if base != self._base:
            self.kept.clear()
        self._base = base
        parts = self._split(base, context, inputs)
        passes = 0 if isinstance(parts, str) else len(parts.groups)
        if base.is_sharded:
            agreed = _agreed(isinstance(parts, str), passes, self._backbone.device)
            if agreed is None and not isinstance(parts, str):
                parts = "another process computes its batch as a whole"
            passes = agreed or 0
        if isinstance(parts, str):
            self._explain(parts)
            return self._forward(*args, **kwargs)
        self._say(self._description(parts))
        try:
            with self._cached_under_checkpointing():
                return self._in_two_parts(parts, passes, context, inputs)
        finally:
            self._state.thread.context = context

    # --- whether -------------------------------------------------------------------

    def _split(
        self, base: Fingerprint, context: ForwardContext, inputs: Inputs
    ) -> TwoParts | str:
        """Return the two parts, or why there is one."""
        if reason := why_whole(self._backbone, self._state, context, inputs):
            return reason
        if base.trained:
            return f"{base.trained} of the base is trained"
        uses_cache = inputs.get("use_cache")
        if uses_cache is None:
            uses_cache = getattr(self._config, "use_cache", False)
        # Transformers makes no masks from position ids where a cache is kept.
        apart = not uses_cache and not self._joins_samples
        # Those that are trained: a reference's forward disables them.
        adapters = list(self._state.layers[0]._active_adapter)
        parts = split_batch(context, inputs, adapters, apart, self.kept)
        if parts is None:
            return _NOT_WORTH
        whole = context.shape[0] * context.shape[1]
        tokens = whole, parts.tokens_before, parts.tokens_behind
        if self.when is not True:
            if not saves_time(self._backbone, *tokens, self._share_of_backward):
                return _NOT_WORTH
        return parts

    @property
    def _share_of_backward(self) -> float:
        """The share of the layers that backward passes."""
        if not torch.is_grad_enabled():
            return 0.0
        layers = list(self._layers)
        lowest = min(layers.index(layer) for layer in self._state.layers)
        return 1 - lowest / len(layers)

    def _explain(self, reason: str) -> None:
        if reason == NOT_ASKED:
            return
        if self.when is True and reason != _NOT_WORTH:
            raise ValueError(
                f"frozen_prompt: true, but {reason}; use frozen_prompt: auto"
            )
        self._say(f"frozen prompt: computed with the rest, since {reason}")

    def _description(self, parts: TwoParts) -> str:
        before = sum(len(preamble.ids) for preamble in parts.preambles)
        total = before + sum(s.end - s.split for s in parts.samples)
        kept = "not kept"
        if self.kept.limit:
            place = "of host memory"
            if self.kept.device.type != "cpu":
                place = f"on {self.kept.device}"
            kept = f"kept in up to {self.kept.limit / 1e9:.3g} GB {place}"
        return (
            f"frozen prompt: computed without gradients, {before} of {total} tokens of "
            f"the first batch; {kept}"
        )

    def _say(self, text: str) -> None:
        kind = text.partition(",")[0]
        if kind not in self._told:
            self._told.add(kind)
            self._tell(text)

    # --- computing -----------------------------------------------------------------

    def _in_two_parts(
        self, parts: TwoParts, passes: int, context: ForwardContext, inputs: Inputs
    ) -> Any:
        others = {k: v for k, v in inputs.items() if k not in OF_TOKENS | OF_THE_HEAD}
        others |= {"past_key_values": None, "use_cache": False}
        states = {preamble: list(kept) for preamble, kept in parts.kept.items()}
        for group in parts.groups:
            new = self._compute_before([states[p] for p in group], group, others)
            for preamble, computed in zip(group, new, strict=True):
                states[preamble].append(computed)
                self.kept.add(preamble.start, preamble.array, computed)
        for _ in range(passes - len(parts.groups)):  # for other processes
            self._compute_before([[]], [Preamble(0, (0,))], others)
        rows = [states[preamble] for preamble in parts.preambles]
        output, source_N, target_N = self._compute_behind(rows, parts, context, others)
        h_MWD = output.last_hidden_state
        shape = *context.shape, h_MWD.shape[-1]
        joined_BTD = h_MWD.new_zeros(shape)
        for sample, pieces in zip(parts.samples, rows, strict=True):
            column = sample.begin
            for piece in pieces:
                joined_BTD[sample.row, column : column + piece.tokens] = piece.hidden
                column += piece.tokens
        h_ND = h_MWD.flatten(0, 1).index_select(0, source_N.to(h_MWD.device))
        joined_SD = joined_BTD.flatten(0, 1)
        joined_SD = joined_SD.index_copy(0, target_N.to(h_MWD.device), h_ND)
        return type(output)(last_hidden_state=joined_SD.view(shape))

    def _compute_before(
        self, rows: list[list[States]], group: list[Preamble], others: Inputs
    ) -> list[States]:
        """Return the states of the tokens that are missing behind those before them."""
        cache = PreambleCache(rows, self._windows)
        done = [sum(states.tokens for states in pieces) for pieces in rows]
        counts = [len(p.ids) - n for p, n in zip(group, done, strict=True)]
        ids = torch.zeros(len(group), max(counts), dtype=torch.long)
        for row, (preamble, count) in enumerate(zip(group, counts, strict=True)):
            ids[row, :count] = torch.tensor(preamble.ids[-count:])
        starts = torch.tensor([p.start + n for p, n in zip(group, done, strict=True)])
        positions = starts[:, None] + torch.arange(ids.shape[1])
        # As in a decode step, nothing is edited.
        shape = ids.shape[0], ids.shape[1]
        self._state.thread.context = ForwardContext(shape, {}, None, cache.width)
        with torch.no_grad():
            output = self._call(cache, ids, positions, done, counts, others)
        return cache.computed(counts, output.last_hidden_state)

    def _compute_behind(
        self,
        rows: list[list[States]],
        parts: TwoParts,
        context: ForwardContext,
        others: Inputs,
    ) -> tuple[Any, Tensor, Tensor]:
        """Return the output (M, W) of the tokens behind the preambles, and its tokens'
        flat indices (N,) there and in the batch."""
        cache, width = PreambleCache(rows, self._windows), parts.width
        shape, columns = (len(rows), width), context.shape[1]
        ids, positions = torch.zeros(2, *shape, dtype=torch.long)
        counts = [sample.end - sample.split for sample in parts.samples]
        # The index behind the preambles of each token of the batch.
        new_S = torch.full((parts.ids_BT.numel(),), -1)
        for number, (row, _, split, end) in enumerate(parts.samples):
            size = end - split
            ids[number, :size] = parts.ids_BT[row, split:end]
            positions[number, :size] = parts.positions_BT[row, split:end]
            first = number * width
            new_S[row * columns + split : row * columns + end] = torch.arange(
                first, first + size
            )
        given = {
            name: [new_S[side_N] for side_N in sides]
            for name, sides in parts.edited.items()
        }
        self._state.thread.context = ForwardContext(
            *(shape, context.adapters, lambda turns: None, cache.width),
            given=given,
            prepared=context.prepared,
        )
        done = [len(preamble.ids) for preamble in parts.preambles]
        output = self._call(cache, ids, positions, done, counts, others)
        target_N = (new_S >= 0).nonzero().flatten()
        return output, new_S[target_N], target_N

    def _call(
        self,
        cache: PreambleCache,
        ids: Tensor,
        positions: Tensor,
        done: list[int],
        counts: list[int],
        others: Inputs,
    ) -> Any:
        """Return the backbone's output of rows of so many tokens behind so many."""
        before, device = cache.width, self._backbone.device
        mask = None
        if set(done) != {before} or set(counts) != {ids.shape[1]}:
            columns = torch.arange(before + ids.shape[1])
            starts = before - torch.tensor(done)[:, None]
            stops = before + torch.tensor(counts)[:, None]
            mask = ((columns >= starts) & (columns < stops)).long().to(device)
        return self._forward(
            **others | {"past_key_values": cache},
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=positions.to(device),
        )

    @contextmanager
    def _cached_under_checkpointing(self) -> Iterator[None]:
        """Let layers that are checkpointed keep their cache."""
        layers = [getattr(layer, "base_layer", layer) for layer in self._layers]
        for layer in layers:
            layer.__dict__[_KEEPS_CACHE] = True
        try:
            yield
        finally:
            for layer in layers:
                del layer.__dict__[_KEEPS_CACHE]


def _agreed(is_whole: bool, passes: int, device: torch.device) -> int | None:
    """Return the most passes before the last one that a process needs; None where one
    computes its batch as a whole. Sharded layers are gathered in all or in none."""
    most = torch.tensor([int(is_whole), passes], device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    is_any_whole, passes = most.tolist()
    return None if is_any_whole else passes
