"""Decoder layers of vLLM's models, edited after their own forward.

Shapes: as in ``edited_rows.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from axolotl_reft.core.affine import AffineStack
from axolotl_reft.serving.edited_rows import EditedRows, edit_rows

# By architecture, the class of its decoder layers in vLLM's models. They return the
# layer's output, or the layer's update and the residual stream, whose sum it is. Others
# return a pair that must not be added (Cohere, EXAONE 4). Only what was compared with
# transformers is here.
LAYERS = {
    "Gemma2ForCausalLM": "Gemma2DecoderLayer",
    "Gemma3ForCausalLM": "Gemma3DecoderLayer",
    "GemmaForCausalLM": "GemmaDecoderLayer",
    "Glm4ForCausalLM": "Glm4DecoderLayer",
    "GraniteForCausalLM": "GraniteDecoderLayer",
    "LlamaForCausalLM": "LlamaDecoderLayer",
    "MistralForCausalLM": "MistralDecoderLayer",
    "MixtralForCausalLM": "MixtralDecoderLayer",
    "Phi3ForCausalLM": "LlamaDecoderLayer",
    "Qwen2ForCausalLM": "Qwen2DecoderLayer",
    "Qwen3ForCausalLM": "Qwen3DecoderLayer",
    "Qwen3MoeForCausalLM": "Qwen3MoeDecoderLayer",
}
# The same where vLLM runs the model of transformers (its Transformers backend).
TRANSFORMERS_LAYERS = {
    "ArceeForCausalLM": "ArceeDecoderLayer",
    "CohereForCausalLM": "CohereDecoderLayer",
    "GlmForCausalLM": "GlmDecoderLayer",
    "GPTNeoXForCausalLM": "GPTNeoXLayer",
    "HeliumForCausalLM": "HeliumDecoderLayer",
    "LlamaForCausalLM": "LlamaDecoderLayer",
    "Olmo2ForCausalLM": "Olmo2DecoderLayer",
    "Olmo3ForCausalLM": "Olmo3DecoderLayer",
    "OlmoForCausalLM": "OlmoDecoderLayer",
    "PhiForCausalLM": "PhiDecoderLayer",
    "SeedOssForCausalLM": "SeedOssDecoderLayer",
    "SmolLM3ForCausalLM": "SmolLM3DecoderLayer",
    "Starcoder2ForCausalLM": "Starcoder2DecoderLayer",
}


class LayerEdits:
    """The edits of a model's layers, of as many adapters as the server holds at once.

    Args:
        model: vLLM's, whose decoder layers of the class ``layer_class`` get buffers,
            and a forward that edits their outputs; ``ValueError`` where they are not
            as many as ``count``.
        rows: of each step.
        adapters, rank, hidden_size: the sizes of the buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        layer_class: str,
        count: int,
        rows: EditedRows,
        adapters: int,
        rank: int,
        hidden_size: int,
    ) -> None:
        self.rows = rows
        self._layers = [m for m in model.modules() if type(m).__name__ == layer_class]
        if len(self._layers) != count:
            raise ValueError(
                f"LoReFT: {type(model).__name__} has {len(self._layers)} layers of the "
                f"class {layer_class}, expected {count}; serve without "
                "--lora-target-modules loreft"
            )
        sizes, device = (2 * adapters, rank), rows.rows_T.device
        for layer in self._layers:
            for name, shape in {
                "loreft_m": (*sizes, hidden_size),
                "loreft_b": sizes,
                "loreft_p": (*sizes, hidden_size),
            }.items():
                zeros = torch.zeros(shape, dtype=torch.float32, device=device)
                layer.register_buffer(name, zeros, persistent=False)
            for name, tensor in zip(_ROWS, rows.tensors, strict=True):
                layer.register_buffer(name, tensor, persistent=False)
            layer.__class__ = _edited_class(type(layer))

    def load(self, slot: int, stacks: Mapping[int, AffineStack]) -> None:
        """Put an adapter's edits, by layer, into a slot; of smaller rank than the
        buffers', with zeros."""
        edits = slice(2 * slot, 2 * slot + 2)
        for number, layer in enumerate(self._layers):
            buffers = [getattr(layer, name)[edits].zero_() for name in _STACK]
            if number not in stacks:
                continue
            for buffer, tensor in zip(buffers, stacks[number], strict=True):
                if tensor is not None:
                    sides, rank = tensor.shape[:2]
                    buffer[:sides, :rank].copy_(tensor)


_STACK = ("loreft_m", "loreft_b", "loreft_p")
_ROWS = ("loreft_rows", "loreft_edits", "loreft_starts", "loreft_strengths")
_edited_classes: dict[type, type] = {}


def _edited_class(layer_class: type) -> type:
    """Return the class of layers with this forward and the edit after it."""
    if layer_class not in _edited_classes:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = layer_class.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
            hidden, residual = output if isinstance(output, tuple) else (output, None)
            edit_rows(
                hidden,
                residual,
                self.loreft_m,
                self.loreft_b,
                self.loreft_p,
                self.loreft_rows,
                self.loreft_edits,
                self.loreft_starts,
                self.loreft_strengths,
            )
            return output

        name = f"Loreft{layer_class.__name__}"
        _edited_classes[layer_class] = type(name, (layer_class,), {"forward": forward})
    return _edited_classes[layer_class]
