"""Forwards that compute what is frozen apart, and keep it.

With ``positions: l<m>`` nothing before a sample's first edited token, its preamble,
depends on what is trained. Its hidden states, keys and values are the frozen base's:
they are computed without gradients, or kept from an earlier forward, and the rest is
computed behind them. The last hidden states of both parts together are those of the
forward as a whole, and so are all gradients.

Whatever the positions, the same holds for hidden states behind the layers below the
first edited one: they are kept, and those layers left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial, update_wrapper
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from axolotl_reft.prompts.kept import KeptStates
from axolotl_reft.tuner.compat import cache_name, forward_parameters
from axolotl_reft.tuner.context import ForwardContext, ModelState
from axolotl_reft.tuner.frozen_base import Fingerprint, lower_saves_time, saves_time
from axolotl_reft.tuner.frozen_reasons import (
    NOT_ASKED,
    OF_THE_HEAD,
    OF_TOKENS,
    Inputs,
    early_positions,
    why_not,
    why_whole,
)
from axolotl_reft.tuner.lower_layers import LowerLayers
from axolotl_reft.tuner.packing import what_joins_samples
from axolotl_reft.tuner.partial_forward import PartialForward
from axolotl_reft.tuner.preamble_cache import windows_of
from axolotl_reft.tuner.two_parts import HostBatch, TwoParts

# Of a batch: with True too it is computed as a whole, and the next one in parts.
_ELSEWHERE = "another process computes its batch as a whole"
_NOT_WORTH = "too few tokens are before the first edited one"
_NOT_IN_ORDER = (
    "the tokens of a sample do not follow each other, or padding predicts a trained one"
)
_OF_A_BATCH = {_ELSEWHERE, _NOT_WORTH, _NOT_IN_ORDER}
# How far a base may be off in two parts, of its hidden states' norm; in float32 it is
# by rounding alone.
_ALLOWED = {True: 1e-2, False: 0.1}
_NAMES = "__module__", "__name__", "__qualname__", "__doc__"


class FrozenPrompt:
    """Computes the forwards of a model's backbone in parts, where that is exact.

    Args:
        layers: the path of the list of layers.
        prefix: of the names of adapters' parameters.
        when: ``auto`` where it saves time as well; True in two parts wherever it can
            be, and an error elsewhere.
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
        kept: KeptStates,
        tell: Callable[[str], None],
    ) -> None:
        self.kept, self.when = kept, when
        self._backbone, self._state, self._prefix = backbones[0], state, prefix
        self._layers = list(model.get_submodule(layers).children())
        self._joins_samples = what_joins_samples(model)
        self._tell, self._told = tell, set[str]()
        self._base: Fingerprint | None = None
        self._forward = self._backbone.forward
        self._names = forward_parameters(self._backbone)
        # Of the instance: accelerate puts its own there.
        self._before = self._backbone.__dict__.get("forward")
        self._lower: LowerLayers | None = None
        self._has_vectors = True  # layers return one for each token
        self._checked = set[tuple[bool, bool]]()
        self._mode, self._whole = (False, False), 0  # forwards as a whole in a row
        self.reason = why_not(model, backbones, state)
        if self.reason:
            self._explain(self.reason)
            return
        bases = [getattr(layer, "base_layer", layer) for layer in self._layers]
        windows = windows_of(self._backbone.config)
        name = str(cache_name(self._names))  # why_not has seen to it
        self._partial_forward = PartialForward(
            self._backbone, self._forward, bases, windows, name, state
        )

    def attach(self) -> None:
        # Patch: a hook can change what a forward is given, but not have two of it run.
        forward = update_wrapper(partial(self.forward), self._forward, _NAMES)
        self._backbone.__dict__["forward"] = forward

    def detach(self) -> None:
        del self._backbone.__dict__["forward"]
        if self._before is not None:
            self._backbone.__dict__["forward"] = self._before
        if self._lower is not None:
            self._lower.detach()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the backbone's output, as a whole or in parts."""
        context = self._state.thread.context
        if context is None or self.reason or torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        if self._looks_away():
            return self._forward(*args, **kwargs)
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        base = Fingerprint(self._backbone, self._prefix)
        if base != self._base:
            self.kept.clear()
        self._base = base
        parts = self._split(base, context, inputs)
        passes = len(parts.groups) if isinstance(parts, TwoParts) else 0
        if base.is_sharded:
            is_whole = not isinstance(parts, TwoParts)
            agreed = _agreed(is_whole, passes, self._backbone.device)
            if agreed is None and not is_whole:
                parts = _ELSEWHERE
            passes = agreed or 0
        if isinstance(parts, str):
            self._whole += parts != NOT_ASKED
            self._explain(parts)
            return self._forward(*args, **kwargs)
        self._whole = 0
        drops = {"cache", "past_key_values", "use_cache", *OF_TOKENS, *OF_THE_HEAD}
        others = {k: v for k, v in inputs.items() if k not in drops}
        partial_forward = replace(self._partial_forward, others=others)
        try:
            batch = parts.batch if isinstance(parts, TwoParts) else parts
            if reason := self._check_base(batch, base, partial_forward, inputs):
                self.reason = reason
                self.kept.clear()
                self._explain(reason)
                self._state.thread.context = context
                return self._forward(*args, **kwargs)
            self._state.thread.context = context
            if isinstance(parts, TwoParts):
                self._say(f"{_text_of(parts)}; {self._text_of_kept}")
                return partial_forward.in_two_parts(parts, passes, context, self.kept)
            assert self._lower is not None
            h_BTD = partial_forward.below(parts, self._lower, self.kept)
            self._state.thread.context = context
            if h_BTD is None:
                self._has_vectors = False
                return self._forward(*args, **kwargs)
            self._say(
                f"hidden states behind {self._lower.count} frozen layers, below the "
                f"first edited one: {self._text_of_kept}"
            )
            with self._lower.given(h_BTD):
                return self._forward(*args, **kwargs)
        finally:
            self._state.thread.context = context

    def _looks_away(self) -> bool:
        """Whether to look at no more than every eighth forward, since the last ones
        were as a whole; under FSDP2 all processes look."""
        if self._base is None or self._base.is_sharded:
            return False
        mode = self._backbone.training, torch.is_grad_enabled()
        if self._mode != mode:
            self._mode, self._whole = mode, 0
        if self._whole < 8 or self.when is True:
            return False
        self._whole += 1
        return self._whole % 8 > 0

    def _check_base(
        self,
        batch: HostBatch,
        base: Fingerprint,
        partial_forward: PartialForward,
        inputs: Inputs,
    ) -> str:
        """Return why the bare base is not the same in two parts; once for each form of
        batch. Some take no notice of a cache, or number positions in their own way."""
        samples = batch.samples
        rows = {sample.row for sample in samples}
        form = any(s.begin for s in samples), len(samples) > len(rows)
        if form in self._checked or (base.is_sharded and self._checked):
            return ""
        self._checked.add(form)
        halves = [s._replace(split=(s.begin + s.end) // 2) for s in samples]
        nothing = KeptStates(0, torch.device("cpu"))
        parts = TwoParts.of(replace(batch, samples=halves, edited={}), nothing)
        shape = batch.ids_BT.shape[0], batch.ids_BT.shape[1]
        context = ForwardContext(shape, self._state.adapters, None)
        passes: int | None = len(parts.groups) if parts else 0
        if base.is_sharded:
            passes = _agreed(parts is None, passes or 0, self._backbone.device)
        if parts is None or passes is None:
            return ""
        with torch.no_grad():
            self._state.thread.context = context
            whole_BTD = self._forward(**inputs).last_hidden_state
            got_BTD = partial_forward.in_two_parts(parts, passes, context, nothing)[0]
        real_BT = torch.zeros(shape, dtype=torch.bool)
        for row, begin, _, end in samples:
            real_BT[row, begin:end] = True
        real_BT = real_BT.to(whole_BTD.device)
        expected_ND = whole_BTD[real_BT].float()
        off = (got_BTD[real_BT] - expected_ND).norm() / expected_ND.norm()
        if base.is_sharded:
            dist.all_reduce(off, dist.ReduceOp.MAX)
        if off <= _ALLOWED[base.is_float32]:
            return ""
        return f"the base by itself is off by {off:.0%} in two parts"

    # --- whether -------------------------------------------------------------------

    def _split(
        self, base: Fingerprint, context: ForwardContext, inputs: Inputs
    ) -> TwoParts | HostBatch | str:
        """Return the two parts; the batch, where its lower layers are computed apart;
        or why the forward is as a whole."""
        if context.on_host is not None:
            # Not what a trainer has taken out since.
            made = context.on_host.tensors
            inputs = {name: made.get(name, inputs[name]) for name in inputs}
        if reason := why_whole(self._backbone, self._state, context, inputs):
            return reason
        if base.trained:
            return f"{base.trained} of the base is trained"
        uses_cache = inputs.get("use_cache")
        if uses_cache is None:
            uses_cache = getattr(self._backbone.config, "use_cache", False)
        # Transformers makes no masks from position ids where a cache is kept.
        apart = not uses_cache and not self._joins_samples
        # Those that are trained: a reference's forward disables them.
        adapters = list(self._state.layers[0]._active_adapter)
        batch = HostBatch.read(context, inputs, adapters, apart)
        if batch is None:
            return _NOT_IN_ORDER
        early = (early_positions(context.adapters[a].positions) for a in adapters)
        reason = next((text for is_early, text in early if is_early), "")
        lowest = self._lowest_edited(adapters)
        below = lowest / len(self._layers)
        backward = 1 - below if self._is_of_a_step else 0.0
        tokens = context.shape[0] * context.shape[1]
        if not reason:
            # Labels that are shifted come with the columns whose logits are computed:
            # of the others nobody sees hidden states.
            is_labelled = inputs.get("shift_labels") is not None
            needs_hidden = batch.answers_early or base.is_sharded or not is_labelled
            parts = TwoParts.of(batch, self.kept, needs_hidden)
            reason = _NOT_WORTH
            if parts and (
                self.when is True or saves_time(self._backbone, tokens, parts, backward)
            ):
                return parts
        can_keep = self.kept.limit and self._has_vectors and not base.is_sharded
        if can_keep and self.when == "auto":
            if lower_saves_time(self._backbone, tokens, below, backward):
                self._cut_at(lowest)
                return batch
        return reason

    @property
    def _is_of_a_step(self) -> bool:
        """Whether the forward has gradients, or another of the same training step may
        use what it keeps: a reference's forward, and KTO's for its KL term, have none.
        """
        keeps = self._backbone.training and self.kept.limit > 0
        return torch.is_grad_enabled() or keeps

    def _cut_at(self, lowest: int) -> None:
        if self._lower is not None and self._lower.count != lowest:
            self._lower.detach()
            self._lower = None
        if self._lower is None:
            self._lower = LowerLayers(self._layers[:lowest], self._state)

    def _lowest_edited(self, adapters: list[str]) -> int:
        """Return the first layer that an adapter edits, or the number of layers."""
        for number, layer in enumerate(self._layers):
            specs = getattr(layer, "specs", {})
            if any(name in specs for name in adapters):
                return number
        return len(self._layers)

    def _explain(self, reason: str) -> None:
        if reason == NOT_ASKED:
            return
        if self.when is True and reason not in _OF_A_BATCH:
            raise ValueError(
                f"frozen_prompt: true, but {reason}; use frozen_prompt: auto"
            )
        self._say(f"frozen prompt: computed with the rest, since {reason}")

    @property
    def _text_of_kept(self) -> str:
        if not self.kept.limit:
            return "not kept"
        is_host = self.kept.device.type == "cpu"
        place = "of host memory" if is_host else f"on {self.kept.device}"
        return f"kept in up to {self.kept.limit / 1e9:.3g} GB {place}"

    def _say(self, text: str) -> None:
        kind = text.partition(",")[0]
        if kind not in self._told:
            self._told.add(kind)
            self._tell(text)


def _text_of(parts: TwoParts) -> str:
    before = sum(len(preamble.ids) for preamble in parts.preambles)
    total = before + sum(s.end - s.split for s in parts.batch.samples)
    return (
        f"frozen prompt: computed without gradients, {before} of {total} tokens of the "
        "first batch"
    )


def _agreed(is_whole: bool, passes: int, device: torch.device) -> int | None:
    """Return the most passes before the last one that a process needs; None where one
    computes its batch as a whole. Sharded layers are gathered in all or in none."""
    most = torch.tensor([int(is_whole), passes], device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    is_any_whole, passes = most.tolist()
    return None if is_any_whole else passes
