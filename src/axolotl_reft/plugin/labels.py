"""Labels for trainers that keep them from the model: label smoothing, EAFT, KD.

They compute the loss themselves, and take the labels, which tell prompt from answer,
out of the batch first.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor


def show_labels(trainer: Any) -> None:
    """Let every loss that ``trainer`` computes find its prompts by the batch's labels,
    also where the model is not given them."""
    tracker = trainer.model.get_base_model().loreft_tracker
    compute_loss = trainer.compute_loss

    @wraps(compute_loss)
    def with_labels(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.get("labels")
        outer = tracker.find_answers
        if labels is not None:
            tracker.find_answers = _answers_of(labels)
        try:
            return compute_loss(model, inputs, *args, **kwargs)
        finally:
            tracker.find_answers = outer

    trainer.compute_loss = with_labels


def _answers_of(labels: Tensor) -> Any:
    def find_answers(ids: Tensor) -> Tensor:
        if labels.shape != ids.shape[:2]:
            raise ValueError(
                f"LoReFT: the labels of the batch are {tuple(labels.shape)}, and the "
                f"model got {tuple(ids.shape[:2])} tokens, so it cannot know the "
                "prompts; use positions: all, or a trainer that leaves tokens as they "
                "are"
            )
        return labels != -100

    return find_answers
