"""What is edited in the first samples of a training, told before its first step.

Wrong prompts are the commonest mistake, and the loss does not show them.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from axolotl_reft.inspect.edit_size import named_interventions
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

# Parts of one sample, such as the turns of a conversation, to show.
_MOST_PARTS = 8


class FirstBatch(TrainerCallback):
    """Tells which tokens of the first samples are edited, once, on the first process.

    The prompts are those that the model itself found in the batch.

    Args:
        model: the PEFT model.
        tokenizer: to show tokens with.
        tell: takes the text.
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
        self._labels: Tensor | None = None
        self._inputs: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero or args.torch_compile:
            return
        base = self._model.get_base_model()
        first = next(named_interventions(self._model, self._adapter), None)
        if first is None:
            return
        self._handles = [
            base.register_forward_pre_hook(self._note_labels, with_kwargs=True),
            base.base_model.register_forward_pre_hook(
                self._note_inputs, with_kwargs=True
            ),
            first[2].register_forward_pre_hook(self._at_layer),
        ]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._unwatch()

    def _unwatch(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._labels, self._inputs = None, {}

    def _note_labels(self, module: Any, args: Any, kwargs: Any) -> None:
        self._labels = kwargs.get("labels")

    def _note_inputs(self, module: Any, args: Any, kwargs: Any) -> None:
        self._inputs = {"input_ids": args[0]} | kwargs if args else kwargs

    def _at_layer(self, layer: Any, args: Any) -> None:
        ids_BT = self._inputs.get("input_ids")
        # Not the forwards of a reference model, nor those of generation.
        if ids_BT is None or not layer.training or not torch.is_grad_enabled():
            return
        positions = layer.specs[self._adapter].positions
        prompts = layer.prompts(self._adapter)
        shown, cut = self._read(ids_BT, positions, prompts)
        self._unwatch()
        self._tell(as_text(shown, str(positions), cut))

    def _read(
        self, ids_BT: Tensor, positions: Positions, prompts: PromptSpans | None
    ) -> tuple[list[list[ShownToken]], bool]:
        """The samples, and whether a prompt of theirs is too short for a side."""
        shape = (ids_BT.shape[0], ids_BT.shape[1])
        mask, labels = self._inputs.get("attention_mask"), self._labels
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == shape:
            real_BT = mask != 0
        trained_BT = None
        if labels is not None and labels.shape == shape:
            trained_BT = (labels != -100).cpu()
        starts_BT = sample_starts(self._inputs, shape)
        sides = edited_sides(positions, prompts, real_BT)
        if prompts is not None:
            inside_BT = prompts.inside_BT.cpu()
        else:
            inside_BT = real_BT.cpu() if trained_BT is None else ~trained_BT
        cut_BT = torch.zeros_like(inside_BT)
        if prompts is not None:
            cut_BT = prompts.cut(positions).cpu()
        shown, cut = [], False
        for row, start, stop in _samples(shape, starts_BT):
            places = [at for at in range(start, stop) if real_BT[row, at]]
            ids = ids_BT[row, places].tolist()
            if not set(ids) - {self._tokenizer.pad_token_id}:
                continue
            trained = None if trained_BT is None else trained_BT[row, places].tolist()
            shown.append(
                shown_tokens(
                    self._tokenizer,
                    ids,
                    {
                        side: edited[row, places].tolist()
                        for side, edited in sides.items()
                    },
                    inside_BT[row, places].tolist(),
                    trained,
                )
            )
            cut |= bool(cut_BT[row, places].any())
            if len(shown) == self._samples:
                break
        return shown, cut


def _samples(
    shape: tuple[int, int], starts_BT: Tensor | None
) -> list[tuple[int, int, int]]:
    """Row, begin and end of each sample; packed rows hold several."""
    found = []
    for row in range(shape[0]):
        begins = [0]
        if starts_BT is not None:
            begins = starts_BT[row].nonzero().flatten().tolist() or [0]
        ends = [*begins[1:], shape[1]]
        found += [(row, a, b) for a, b in zip(begins, ends, strict=True)]
    return found


def as_text(samples: list[list[ShownToken]], positions: str, cut: bool) -> str:
    """Several lines for a log.

    Args:
        cut: a side was cut off at half of a prompt.
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
        for part, some in found[:_MOST_PARTS]:
            lines.append(f"  {part:6}  {plain_line(some)}")
        if len(found) > _MOST_PARTS:
            lines.append(f"  … {len(found) - _MOST_PARTS} parts more")
    return "\n".join(lines)
