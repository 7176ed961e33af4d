"""Finds a forward's prompts in its batch.

Shapes: B batch, T tokens of this forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor

from axolotl_reft.prompts.batch import answered_spans, real_tokens, sample_starts
from axolotl_reft.prompts.spans import PromptSpans
from axolotl_reft.prompts.turns import Turns


def tokens_of(inputs: Mapping[str, Any]) -> Tensor:
    """Return a forward's tokens (B, T), or their embeddings (B, T, D)."""
    ids_BT: Tensor | None = inputs.get("input_ids")
    return inputs["inputs_embeds"] if ids_BT is None else ids_BT


def batch_spans(
    inputs: Mapping[str, Any],
    tokens: Tensor,
    find_answers: Callable[[], Tensor] | None,
    expects_answers: bool,
    trainer: str | None,
    checks_marks: bool,
    turns: Turns,
) -> PromptSpans:
    """Find the prompts of whole samples, in a forward without a cache.

    Args:
        tokens: ids (B, T), or embeddings (B, T, D).
        find_answers: returns the mask of the answers' tokens, where they are known.
        expects_answers: warn where they are not.
        trainer: whose training forwards have answers, so that it is an error instead.
        checks_marks: refuse marks that contradict them, and wait for the device.
    """
    shape, ids_BT = (tokens.shape[0], tokens.shape[1]), inputs.get("input_ids")
    real_BT = real_tokens(inputs.get("attention_mask"), shape, tokens.device)
    starts_BT = sample_starts(inputs, shape)
    if find_answers is not None:
        answer_BT = find_answers().expand(shape).to(tokens.device) != 0
        return answered_spans(
            turns, ids_BT, real_BT, starts_BT, answer_BT, checks_marks
        )
    if expects_answers and trainer is not None:
        raise unknown_answers(tokens, trainer)
    if expects_answers:
        warnings.warn(
            "LoReFT: a training forward without labels takes the whole input as the "
            "prompt. If the input holds answers, pass the labels to the model",
            UserWarning,
            stacklevel=2,
        )
    return turns.spans(real_BT, ids_BT, starts_BT)


def unknown_answers(tokens: Tensor, trainer: str = "the trainer") -> ValueError:
    """Return the error for tokens (B, T) of a trainer that does not mark answers."""
    return ValueError(
        "LoReFT cannot tell prompt from answer in a batch of shape "
        f"{tuple(tokens.shape[:2])}: {trainer} has neither labels nor a completion "
        "mask for it. Pass the model labels, -100 at the tokens of prompts, or use "
        "positions: all"
    )


def refuse_continuous_batching(*_: object) -> NoReturn:
    """Refuse ``generate_batch`` where an adapter asks for prompts."""
    raise ValueError(
        "continuous batching (generate_batch, transformers serve) mixes pieces of "
        "prompts and of answers in a row without saying which is which; call generate, "
        "with several prompts padded on the left, or use an adapter with positions: all"
    )
