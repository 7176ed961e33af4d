"""Finds a forward's prompts in its batch, or behind its cache.

Shapes: B batch, T tokens of this forward, W columns seen so far (the cache's and T).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor

from axolotl_reft.prompts.batch import answered_spans, real_tokens, sample_starts
from axolotl_reft.prompts.generation import Tokens
from axolotl_reft.prompts.spans import PromptSpans
from axolotl_reft.prompts.turns import Turns


def batch_spans(
    inputs: Mapping[str, Any],
    tokens: Tensor,
    find_answers: Callable[[], Tensor] | None,
    expects_labels: bool,
    turns: Turns,
) -> PromptSpans:
    """Find the prompts of whole samples, in a forward without a cache.

    Args:
        inputs: of the backbone.
        tokens: their ids (B, T), or embeddings (B, T, D).
        find_answers: returns the mask of the answers' tokens, where labels or a trainer
            tell them; None where nobody does.
        expects_labels: warn that a training forward has none.
    """
    shape, ids_BT = (tokens.shape[0], tokens.shape[1]), inputs.get("input_ids")
    real_BT = real_tokens(inputs.get("attention_mask"), shape, tokens.device)
    starts_BT = sample_starts(inputs, shape)
    if find_answers is not None:
        answer_BT = find_answers().expand(shape).to(tokens.device) != 0
        return answered_spans(turns, ids_BT, real_BT, starts_BT, answer_BT)
    if expects_labels:
        warnings.warn(
            "LoReFT: a training forward without labels takes the whole input as the "
            "prompt. If the input holds answers, pass the labels to the model (a "
            "trainer that takes them out, as label smoothing does, cannot be used with "
            "prompt positions)",
            UserWarning,
            stacklevel=2,
        )
    return turns.spans(real_BT, ids_BT, starts_BT)


def cached_spans(
    known: Tokens, ids_BT: Tensor, mask: Tensor | None, turns: Turns
) -> PromptSpans | None:
    """Find prompts by their marks, in a forward on a cache of remembered tokens.

    Args:
        known: the tokens behind the cache.
        mask: the 2-D attention mask (B, W).
    """
    if not turns.generation_prompts:
        return None
    seen = known.followed_by(ids_BT)
    rows, width = seen.ids_BW.shape
    real_BW = real_tokens(mask, (rows, width), ids_BT.device)
    spans = turns.spans(real_BW, seen.ids_BW, None, seen.answer_BW)
    return spans.columns(width - ids_BT.shape[1], width)


def refuse_continuous_batching(*_: object) -> NoReturn:
    """Refuse ``generate_batch`` where an adapter asks for prompts."""
    raise ValueError(
        "continuous batching (generate_batch, transformers serve) mixes pieces of "
        "prompts and of answers in a row and does not say which is which, so that "
        "LoReFT cannot know what to edit; call generate, with prompts padded on the "
        "left for several, or use an adapter with positions: all"
    )
