"""Show which tokens of the first training samples are edited, before the first step.

Wrong prompts are the commonest mistake, and the loss does not show them.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from axolotl_reft.inspect.tokens import (
    PROMPT,
    ShownToken,
    edited_sides,
    legend,
    parts,
    plain_line,
    shown_tokens,
)
from axolotl_reft.prompts.batch import sample_starts
from axolotl_reft.prompts.positions import Positions
from axolotl_reft.prompts.spans import PromptSpans
from axolotl_reft.tuner.walk import interventions_of

# More parts of a sample, such as the turns of a conversation, are not shown.
_MOST_PARTS = 8


class FirstBatch(TrainerCallback):
    """Shows the edits of the first samples once, on the first process.

    The prompts are those that the model itself found in the batch.

    Args:
        model: the PEFT model.
        tokenizer: to show tokens with.
        tell: called with the text.
        samples: how many to show.
        adapter: name of the adapter.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tell: Callable[[str], None],
        samples: int = 3,
        adapter: str = "default",
    ) -> None:
        self._model, self._tokenizer, self._tell = model, tokenizer, tell
        self._samples, self._adapter = samples, adapter
        self._handles: list[RemovableHandle] = []
        self._inputs: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        first = next(interventions_of(self._model, self._adapter), None)
        if first is None or not state.is_world_process_zero or args.torch_compile:
            return
        base = self._model.get_base_model()
        # The backbone's inputs; labels go to the base model alone.
        self._handles = [
            model.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)
            for model in (base, base.base_model)
        ]
        self._handles.append(first[2].register_forward_pre_hook(self._at_layer))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._unwatch()

    def _unwatch(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._inputs = {}

    def _keep_inputs(self, module: Any, args: Any, kwargs: Any) -> None:
        self._inputs |= ({"input_ids": args[0]} if args else {}) | kwargs

    def _at_layer(self, layer: Any, args: Any) -> None:
        ids_BT = self._inputs.get("input_ids")
        # Skip the forwards of a reference model and of generation.
        if ids_BT is None or not layer.training or not torch.is_grad_enabled():
            return
        positions = layer.specs[self._adapter].positions
        spans = layer.prompts(self._adapter)
        samples, cut = self._read(ids_BT, positions, spans)
        self._unwatch()
        self._tell(as_text(samples, str(positions), cut))

    def _read(
        self, ids_BT: Tensor, positions: Positions, spans: PromptSpans | None
    ) -> tuple[list[list[ShownToken]], bool]:
        """Return the samples, and whether a prompt in them is too short for a side."""
        shape = (ids_BT.shape[0], ids_BT.shape[1])
        mask, labels = self._inputs.get("attention_mask"), self._inputs.get("labels")
        real_BT = torch.ones(shape, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == shape:
            real_BT = mask.cpu() != 0
        trained_BT = None
        if labels is not None and labels.shape == shape:
            trained_BT = labels.cpu() != -100
        sides = edited_sides(positions, spans, real_BT)
        cut_BT = torch.zeros_like(real_BT)
        if spans is not None:
            inside_BT, cut_BT = spans.inside_BT.cpu(), spans.cut(positions).cpu()
        else:
            inside_BT = real_BT if trained_BT is None else ~trained_BT
        shown: list[list[ShownToken]] = []
        any_cut = False
        for row, start, stop in _samples(sample_starts(self._inputs, shape), shape):
            at = start + real_BT[row, start:stop].nonzero().flatten()
            ids = ids_BT[row].cpu()[at].tolist()
            if not set(ids) - {self._tokenizer.pad_token_id}:
                continue
            edited = {side: mask[row, at].tolist() for side, mask in sides.items()}
            inside = inside_BT[row, at].tolist()
            trained = None if trained_BT is None else trained_BT[row, at].tolist()
            shown.append(shown_tokens(self._tokenizer, ids, edited, inside, trained))
            any_cut |= bool(cut_BT[row, at].any())
            if len(shown) == self._samples:
                break
        return shown, any_cut


def _samples(
    starts_BT: Tensor | None, shape: tuple[int, int]
) -> Iterator[tuple[int, int, int]]:
    """Yield the row, begin and end of each sample; packed rows hold several."""
    for row in range(shape[0]):
        begins = [0]
        if starts_BT is not None:
            begins = starts_BT[row].nonzero().flatten().tolist() or [0]
        for begin, end in zip(begins, [*begins[1:], shape[1]], strict=True):
            yield row, begin, end


def as_text(samples: list[list[ShownToken]], positions: str, cut: bool) -> str:
    """Return several lines for a log.

    Args:
        cut: whether a side was cut off at half of a prompt.
    """
    signs = legend(token for sample in samples for token in sample) or "none"
    half = " (each side at most half of a prompt)" if cut else ""
    lines = [f"LoReFT edits at {positions} in the first samples: {signs}{half}"]
    for number, tokens in enumerate(samples, 1):
        prompt = sum(token.part == PROMPT for token in tokens)
        edited = sum(token.edited is not None for token in tokens)
        lines.append(
            f"sample {number}: {len(tokens)} tokens, {prompt} in prompts, "
            f"{edited} edited"
        )
        found = parts(tokens)
        for part, group in found[:_MOST_PARTS]:
            lines.append(f"  {part:6}  {plain_line(group)}")
        if len(found) > _MOST_PARTS:
            lines.append(f"  … {len(found) - _MOST_PARTS} parts more")
    return "\n".join(lines)
