"""Prompts of a batch, read from its own ids, labels, masks and position ids.

The same functions run in a data collator on the host and in a forward on the device.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from axolotl_reft.prompts.spans import PromptSpans, any_in_sample
from axolotl_reft.prompts.turns import Turns


def labelled_spans(batch: Mapping[str, Any], turns: Turns) -> PromptSpans | None:
    """Return the prompts of a collated batch with labels; None where labels are not of
    its tokens."""
    ids_BT, labels_BT = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids_BT, Tensor) or not isinstance(labels_BT, Tensor):
        return None
    shape = (ids_BT.shape[0], ids_BT.shape[1])
    if labels_BT.shape != shape:
        return None
    real_BT = real_tokens(batch.get("attention_mask"), shape, ids_BT.device)
    starts_BT = sample_starts(batch, shape)
    return answered_spans(turns, ids_BT, real_BT, starts_BT, labels_BT != -100)


def answered_spans(
    turns: Turns,
    ids_BT: Tensor | None,
    real_BT: Tensor,
    starts_BT: Tensor | None,
    answer_BT: Tensor,
) -> PromptSpans:
    """Return the prompts of samples whose answers are known, packed or not."""
    if starts_BT is not None:
        # The padded end of a packed row looks like one more sample.
        real_BT = real_BT & any_in_sample(answer_BT, starts_BT)
    return turns.spans(real_BT, ids_BT, starts_BT, answer_BT)


def sample_starts(inputs: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Return True where ``position_ids`` begin anew: the samples of packed rows."""
    position_ids = inputs.get("position_ids")
    if position_ids is None:
        return None
    starts = position_ids == 0
    if starts.ndim == 3:  # multimodal rotary embeddings: (axes, B, T)
        starts = starts.all(0)  # an image at the start is at 0 in time as a whole
    return starts.expand(shape)


def real_tokens(mask: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return True where there is a token, from a 2-D mask of 0 and 1, or of segment
    numbers; ``ValueError`` for a mask of another shape."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    got = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
    if got != shape:
        raise ValueError(
            f"LoReFT reads prompts from the 2-D attention mask {shape}, got {got}; "
            "pass the mask as the tokenizer makes it, or use positions: all"
        )
    return mask.to(device) != 0
