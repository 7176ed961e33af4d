"""How many prompts a batch has, counted on the host before it goes to a device.

How many tokens a forward edits is known from its ids and labels alone. On an
accelerator, asking would make the host wait; so a data collator asks, and the number
goes to the model's forward beside the batch, where the tracker takes it out.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from axolotl_reft.prompts.turns import Turns
from axolotl_reft.tuner.prompts import (
    PROMPTS,
    PromptTracker,
    answered_prompts,
    real_tokens,
    sample_starts,
)


@dataclass(frozen=True)
class PromptCounter:
    """A data collator that adds the number of prompts to what another one makes.

    Args:
        collate: the other one, whose batches have ``input_ids`` and ``labels`` (B, T).
        turns: of the adapters that are trained; :meth:`of` a model's.
    """

    collate: Callable[..., Any]
    turns: frozenset[Turns]

    @classmethod
    def of(cls, model: Any, collate: Callable[..., Any]) -> PromptCounter:
        """For a PEFT model with LoReFT adapters."""
        tracker: PromptTracker = model.get_base_model().loreft_tracker
        return cls(collate, frozenset(tracker.turns))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.collate(*args, **kwargs)
        count = count_prompts(batch, self.turns)
        if count is not None:
            batch[PROMPTS] = count
        return batch


def count_prompts(batch: Mapping[str, Any], turns: frozenset[Turns]) -> int | None:
    """At least as many prompts as a batch has: the next power of two, so that a
    compiled model meets few different numbers. None where it cannot be told."""
    ids_BT, labels_BT = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids_BT, Tensor) or not isinstance(labels_BT, Tensor):
        return None
    shape = (ids_BT.shape[0], ids_BT.shape[1])
    if labels_BT.shape != shape or not turns:
        return None
    real_BT = real_tokens(batch.get("attention_mask"), shape, ids_BT.device)
    starts_BT, answer_BT = sample_starts(dict(batch), shape), labels_BT != -100
    runs = [
        answered_prompts(one, ids_BT, real_BT, starts_BT, answer_BT) for one in turns
    ]
    spans = [one.spans() for one in runs]
    most = max(int((s.inside_BT & (s.rank_BT == 0)).sum()) for s in spans)
    return 1 << max(most - 1, 0).bit_length()
