"""What a trainer's batches say of prompts, where the model would not get to know it.

Label smoothing, EAFT and KD compute the loss themselves, and take the labels, which
tell prompt from answer, out of the batch first. And how many prompts there are is
counted before a batch goes to an accelerator.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from axolotl_reft.prompt_counts import PromptCounter


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


def count_prompts(trainer: Any) -> None:
    """Let the batches of the training say how many prompts they have.

    In the loader alone: axolotl's callbacks set attributes of the trainer's collator.
    Not of streamed data, which one process may read for all, laying tensors together.
    """
    get_train_dataloader = trainer.get_train_dataloader

    @wraps(get_train_dataloader)
    def counting() -> Any:
        collate = trainer.data_collator
        if not isinstance(trainer.train_dataset, IterableDataset):
            trainer.data_collator = PromptCounter.of(trainer.model, collate)
        try:
            return get_train_dataloader()
        finally:
            trainer.data_collator = collate

    trainer.get_train_dataloader = counting


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
