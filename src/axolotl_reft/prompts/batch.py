"""Prompts of a batch, read from its own ids, labels, masks and position ids.

The same functions run in a data collator on the host and in a forward on the device.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from axolotl_reft.prompts.spans import (
    PromptSpans,
    any_in_sample,
    more_in_sample,
    prompt_spans,
)
from axolotl_reft.prompts.turns import Turns


def labelled_spans(batch: Mapping[str, Any], turns: Turns) -> PromptSpans | None:
    """Return the prompts of a collated batch with labels; None where labels are not of
    its tokens. ``ValueError`` where the marks contradict the labels."""
    ids_BT, labels_BT = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids_BT, Tensor) or not isinstance(labels_BT, Tensor):
        return None
    shape = (ids_BT.shape[0], ids_BT.shape[1])
    if labels_BT.shape != shape:
        return None
    real_BT = real_tokens(batch.get("attention_mask"), shape, ids_BT.device)
    starts_BT = sample_starts(batch, shape)
    trained_BT = labels_BT != -100
    return answered_spans(turns, ids_BT, real_BT, starts_BT, trained_BT, checks=True)


def answered_spans(
    turns: Turns,
    ids_BT: Tensor | None,
    real_BT: Tensor,
    starts_BT: Tensor | None,
    answer_BT: Tensor,
    checks: bool = False,
) -> PromptSpans:
    """Return the prompts of samples whose answers are known, packed or not.

    Answers are those of the marks and the known ones. A single known token behind the
    end of a marked answer, such as a template's trained line break, stays what it is at
    inference: the beginning of the next prompt.

    Args:
        checks: raise ``ValueError`` where the marks take known answers for prompt, so
            that inference would edit other tokens. An accelerator is waited for.
    """
    if starts_BT is not None:
        # The padded end of a packed row looks like one more sample.
        real_BT = real_BT & any_in_sample(answer_BT, starts_BT)
    if ids_BT is not None and turns.generation_prompts:
        marked_BT, opens_BT = turns.answers(ids_BT, starts_BT)
        # a > b is a & ~b, as one operation.
        single_BT = pad(marked_BT, (1, -1)) > pad(answer_BT, (-1, 1))
        known_BT = answer_BT > single_BT
        answer_BT = marked_BT | known_BT
        if checks and (known_BT > marked_BT).any():
            inside_BT = prompt_spans(real_BT, starts_BT, marked_BT, turns.every)[0]
            wrong_BT = inside_BT & known_BT & any_in_sample(opens_BT, starts_BT)
            closes_BT = turns.ends(ids_BT) | _goes_on(marked_BT, answer_BT, starts_BT)
            wrong_BT &= ~closes_BT | more_in_sample(opens_BT, starts_BT)
            if wrong_BT.any():
                raise _contradiction(ids_BT, wrong_BT)
    return prompt_spans(real_BT, starts_BT, answer_BT, turns.every)


def _goes_on(marked_BT: Tensor, answer_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
    """Return True for answers' tokens that a marked one goes on to without a break.

    Behind a sample's last answer they, and ends of turns, move no prompt: a template
    may close a conversation with more than it ends an answer with.
    """
    begins_BT = answer_BT > pad(answer_BT, (1, -1))
    if starts_BT is not None:
        begins_BT = begins_BT | starts_BT
    return any_in_sample(marked_BT, begins_BT)


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


def _contradiction(ids_BT: Tensor, wrong_BT: Tensor) -> ValueError:
    row, column = wrong_BT.nonzero()[0].tolist()
    before, after = ids_BT[row, :column].tolist(), ids_BT[row, column:].tolist()
    return ValueError(
        "turn_markers: the labels train tokens that are prompt by the adapter's turn "
        f"markers, first in row {row}, column {column} of a batch: token ids "
        f"{after[:8]} after {before[-8:]}. No marker announces an answer "
        "there, and inference would edit it as a part of the next prompt. Leave such "
        "turns untrained, make the adapter anew if its markers are older than the chat "
        "template, or use turns: first or positions: all"
    )
