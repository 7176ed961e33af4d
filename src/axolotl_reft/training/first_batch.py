"""Show which tokens of the first training samples are edited, before the first step.

Wrong prompts are the commonest mistake, and the loss does not show them.

Shapes: B batch, T tokens, N tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from axolotl_reft.inspect import tokens
from axolotl_reft.prompts.batch import sample_starts
from axolotl_reft.prompts.spans import any_in_sample, more_in_sample
from axolotl_reft.tuner.layer import interventions_of
from axolotl_reft.tuner.model import hooks_of

_MAX_SAMPLES = 3
# More parts of a sample, such as the turns of a conversation, are not shown.
_MAX_PARTS = 8
_PARTS = ("prompt", "answer", "other")


class FirstBatch(TrainerCallback):
    """Shows the edits of the first samples once, on the first process.

    The prompts are those that the model itself found in the batch.

    Args:
        model: the PEFT model.
        tokenizer: to show tokens with.
        tell: called with the text.
    """

    def __init__(self, model: Any, tokenizer: Any, tell: Callable[[str], None]) -> None:
        hooks = hooks_of(model.get_base_model())
        self._backbones = hooks.backbones if hooks else []
        self._layer = next(interventions_of(model, "default")).wrapper
        self._tokenizer, self._tell = tokenizer, tell
        self._handles: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and not args.torch_compile:
            # Ahead of the hook that drops the forward's context.
            self._handles = [
                backbone.register_forward_hook(
                    self._after_backbone, with_kwargs=True, prepend=True
                )
                for backbone in self._backbones
            ]

    def _after_backbone(
        self, module: Any, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        inputs = ({"input_ids": args[0]} if args else {}) | kwargs
        # Skip the forwards of a reference model and of generation.
        has_gradients = self._layer.training and torch.is_grad_enabled()
        if has_gradients and inputs.get("input_ids") is not None:
            for handle in self._handles:
                handle.remove()
            self._tell(self._text(inputs))

    def _text(self, inputs: Mapping[str, Any]) -> str:
        positions = self._layer.specs["default"].positions
        samples, cut = self._read(inputs)
        signs = tokens.legend(token for sample in samples for token in sample) or "none"
        half = " (each side at most half of a prompt)" if cut else ""
        lines = [f"LoReFT edits at {positions} in the first samples: {signs}{half}"]
        for number, sample in enumerate(samples, 1):
            prompt = sum(token.part == "prompt" for token in sample)
            edited = sum(token.edited is not None for token in sample)
            lines.append(
                f"sample {number}: {len(sample)} tokens, {prompt} in prompts, "
                f"{edited} edited"
            )
            parts = []
            for part, group in groupby(sample, key=lambda token: token.part):
                text = "".join(text for _, text in tokens.runs(group, keep=12))
                parts.append(f"  {part:6}  {text}")
            lines += parts[:_MAX_PARTS]
            if len(parts) > _MAX_PARTS:
                lines.append(f"  … {len(parts) - _MAX_PARTS} parts more")
        return "\n".join(lines)

    def _read(
        self, inputs: Mapping[str, Any]
    ) -> tuple[list[list[tokens.ShownToken]], bool]:
        """Return the samples, and whether a prompt in them is too short for a side."""
        ids_BT, mask = inputs["input_ids"].cpu(), inputs.get("attention_mask")
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == ids_BT.shape:
            real_BT = mask.cpu() != 0
        positions = self._layer.specs["default"].positions
        spans = self._layer.prompts("default")
        sides_BT = tokens.edited_sides(positions, spans, real_BT)
        inside_BT = real_BT if spans is None else spans.inside_BT.cpu()
        cut_BT = ~real_BT if spans is None else spans.truncated(positions).cpu()
        answer_BT = ~inside_BT
        find_answers = self._layer.state.context.find_answers
        # With positions: all the answers need not be known.
        with suppress(ValueError):
            if find_answers is not None:
                answer_BT = find_answers().expand(ids_BT.shape).cpu() != 0
        if spans is None:
            inside_BT = ~answer_BT
        starts_BT = sample_starts(inputs, ids_BT.shape)
        if starts_BT is not None:
            starts_BT = starts_BT.cpu()
        # Templates end an answer with a line break, which begins a prompt without one.
        beside_BT = real_BT & ~inside_BT
        ends_BT = any_in_sample(beside_BT, starts_BT)
        ends_BT &= ~more_in_sample(beside_BT, starts_BT)
        inside_BT, cut_BT = inside_BT & ~ends_BT, cut_BT & ~ends_BT
        parts_BT = torch.where(inside_BT, 0, torch.where(answer_BT, 1, 2))
        samples, any_cut = [], False
        pad = self._tokenizer.pad_token_id
        text_BT = real_BT if pad is None else ids_BT != pad
        found = _samples(text_BT, real_BT, starts_BT)
        for row, at_N in islice(found, _MAX_SAMPLES):
            columns = (t[row, at_N].tolist() for t in (ids_BT, sides_BT, parts_BT))
            samples.append(
                [
                    tokens.ShownToken(
                        tokens.token_text(self._tokenizer, token),
                        tokens.SIDES[side],
                        _PARTS[part],
                    )
                    for token, side, part in zip(*columns, strict=True)
                ]
            )
            any_cut |= bool(cut_BT[row, at_N].any())
        return samples, any_cut


def _samples(
    text_BT: Tensor, real_BT: Tensor, starts_BT: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield row and columns of each sample with text; packed rows hold several."""
    for row, real_T in enumerate(real_BT):
        starts = () if starts_BT is None else starts_BT[row].nonzero().flatten()
        for at_N in torch.arange(len(real_T)).tensor_split(starts):
            at_N = at_N[real_T[at_N]]
            if text_BT[row, at_N].any():
                yield row, at_N
