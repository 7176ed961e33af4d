"""Sources of a forward's prompts: its batch, ``generate``, or a cache.

Shapes: B batch, T tokens of this forward, W columns seen so far (the cache's and T).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from axolotl_reft.prompts.batch import answered_spans, real_tokens, sample_starts
from axolotl_reft.prompts.generation import Generation, Tokens
from axolotl_reft.prompts.spans import PromptSpans
from axolotl_reft.prompts.turns import Turns


class PromptSource:
    """A forward without prompts, as a decode step is; the base of the others.

    Attributes:
        shape: B and T.
        past: columns in the cache before the forward; 0 for none.
        is_decode_step: True where that is known without asking for prompts.
        one_sample_rows: no row holds several packed samples.
    """

    is_decode_step = False
    one_sample_rows = True

    def __init__(self, shape: tuple[int, int], past: int) -> None:
        self.shape, self.past = shape, past

    def spans(self, turns: Turns) -> PromptSpans | None:
        """Return the prompts of such turns; None where there is no prompt."""
        return None


class DecodeStep(PromptSource):
    """A forward of answer tokens on a filled cache."""

    is_decode_step = True


class SampleBatch(PromptSource):
    """A forward without a cache: whole samples, with or without answers.

    Args:
        inputs: of the backbone.
        find_answers: returns the mask of the answers' tokens, where labels or a trainer
            tell them; None where nobody does.
        expects_labels: warn that a training forward has none.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        inputs: Mapping[str, Any],
        find_answers: Callable[[], Tensor] | None,
        expects_labels: bool,
    ) -> None:
        super().__init__(shape, 0)
        self._device, self._expects_labels = device, expects_labels
        self._ids_BT, self._mask = inputs.get("input_ids"), inputs.get("attention_mask")
        self.find_answers = find_answers
        self._starts_BT = sample_starts(inputs, shape)
        self.one_sample_rows = self._starts_BT is None

    def spans(self, turns: Turns) -> PromptSpans:
        real_BT = real_tokens(self._mask, self.shape, self._device)
        if self.find_answers is None:
            if self._expects_labels:
                _warn_without_labels()
            return turns.spans(real_BT, self._ids_BT, self._starts_BT)
        answer_BT = self.find_answers().expand(self.shape).to(self._device) != 0
        return answered_spans(turns, self._ids_BT, real_BT, self._starts_BT, answer_BT)


class ContinuousBatch(PromptSource):
    """A forward of continuous batching, refused once an adapter asks for prompts."""

    def spans(self, turns: Turns) -> PromptSpans | None:
        raise cannot_batch_continuously()


class GenerationStep(PromptSource):
    """A forward inside ``generate``, whose prompt is what that was given."""

    def __init__(
        self,
        generation: Generation,
        shape: tuple[int, int],
        device: torch.device,
    ) -> None:
        super().__init__(shape, generation.past)
        self._generation, self._device = generation, device

    def spans(self, turns: Turns) -> PromptSpans | None:
        rows, tokens = self.shape
        return self._generation.step(turns, rows, tokens, self._device)


class CachedChunk(PromptSource):
    """A forward on a filled cache whose tokens are remembered: marks tell its prompts.

    Args:
        known: the tokens behind the cache.
        mask: the 2-D attention mask (B, W).
    """

    def __init__(self, known: Tokens, ids_BT: Tensor, mask: Any, past: int) -> None:
        super().__init__((ids_BT.shape[0], ids_BT.shape[1]), past)
        self._known, self._ids_BT, self._mask = known, ids_BT, mask

    def spans(self, turns: Turns) -> PromptSpans | None:
        if not turns.generation_prompts:
            return None
        seen = self._known.followed_by(self._ids_BT)
        width = self.past + self.shape[1]
        shape, device = (self.shape[0], width), self._ids_BT.device
        real_BW = real_tokens(self._mask, shape, device)
        spans = turns.spans(real_BW, seen.ids_BW, None, seen.answer_BW)
        return spans.columns(self.past, width)


def _warn_without_labels() -> None:
    warnings.warn(
        "LoReFT: a training forward without labels takes the whole input as "
        "the prompt. If the input holds answers, pass the labels to the model "
        "(a trainer that takes them out, as label smoothing does, cannot be "
        "used with prompt positions)",
        UserWarning,
        stacklevel=2,
    )


def cannot_batch_continuously() -> ValueError:
    """Say why ``generate_batch`` cannot know the prompts."""
    return ValueError(
        "continuous batching (generate_batch, transformers serve) mixes pieces of "
        "prompts and of answers in a row and does not say which is which, so that "
        "LoReFT cannot know what to edit; call generate, with prompts padded on the "
        "left for several, or use an adapter with positions: all"
    )
