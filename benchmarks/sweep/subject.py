"""A base with its adapters and its reference, and the batches that they read.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import copy
import inspect
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_reft import LoreftConfig
from axolotl_reft.core.interventions import Intervention
from benchmarks.sweep.inputs import Inputs
from benchmarks.sweep.reference import Layers, Reference, find_layers

# Of the text; tokens of images and sounds come before it.
_LENGTH, _SHORTER, _PROMPT, _SHORTER_PROMPT = 37, 30, 21, 17
_POSITIONS = "f2+l2"
_RANK = 3


class Subject:
    """An architecture's base, with what the checks make of it."""

    def __init__(self, base: PreTrainedModel, kind: str, inputs: Inputs) -> None:
        self.base, self.kind, self.inputs = base, kind, inputs
        self.generates = base.can_generate()
        parameters = inspect.signature(base.forward).parameters
        self.takes_labels = "labels" in parameters and self.kind != "encoder"
        self.takes_mask = "attention_mask" in parameters
        count = inputs.count
        self.length, self.shorter = _LENGTH + count, _SHORTER + count
        self.prompt, self.shorter_prompt = _PROMPT + count, _SHORTER_PROMPT + count
        self.width = base.config.get_text_config().hidden_size

    # --- inputs --------------------------------------------------------------------

    def ids(self, rows: int, tokens: int, seed: int = 0) -> Tensor:
        return self.inputs.ids(rows, tokens, seed)

    def padded(self, left: bool, lengths: tuple[int, int]) -> dict[str, Tensor]:
        """Return a batch of two rows, the second of which is shorter."""
        ids_BT = self.ids(2, lengths[0])
        mask_BT = torch.ones_like(ids_BT)
        gap = lengths[0] - lengths[1]
        kept = ids_BT[1, : lengths[1]].clone()
        empty, text = (
            (slice(None, gap), slice(gap, None))
            if left
            else (
                slice(lengths[1], None),
                slice(None, lengths[1]),
            )
        )
        ids_BT[1, text], ids_BT[1, empty], mask_BT[1, empty] = kept, 0, 0
        return self.batch(ids_BT, mask_BT)

    def batch(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> dict[str, Any]:
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        inputs = {"input_ids": ids_BT, **self.inputs.extras(ids_BT)}
        return inputs | {"attention_mask": mask_BT} if self.takes_mask else inputs

    def forward(self, model: nn.Module, rows: int, tokens: int) -> Tensor:
        return output(model(**self.batch(self.ids(rows, tokens))))

    # --- models --------------------------------------------------------------------

    def adapted(self, positions: str) -> PeftModel:
        torch.manual_seed(1)
        config = LoreftConfig(positions=positions, rank=_RANK)
        model = get_peft_model(copy.deepcopy(self.base), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return model

    @cached_property
    def adapter(self) -> PeftModel:
        return self.adapted(_POSITIONS)

    @cached_property
    def layers(self) -> Layers:
        return find_layers(self.base, self.width, self.forward, self.inputs.count)

    def reference_of(self, adapter: PeftModel) -> Reference:
        return Reference(self.base, self.layers, interventions(adapter))

    @cached_property
    def reference(self) -> Reference:
        return self.reference_of(self.adapter)


def output(result: Any) -> Tensor:
    """Return a model's logits, or a base model's hidden states."""
    logits = getattr(result, "logits", None)
    if logits is None:
        logits = result.last_hidden_state
    return logits


def interventions(adapter: PeftModel) -> list[Intervention]:
    return [m for m in adapter.modules() if isinstance(m, Intervention)]


def columns(*texts: tuple[int, int]) -> list[list[int]]:
    """Return the first two and the last two columns of texts from, to."""
    return [[begin, begin + 1, end - 2, end - 1] for begin, end in texts]
