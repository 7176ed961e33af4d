"""What a trainer's batches say of prompts and labels, where the model would not get to
know it.

Label smoothing, EAFT and KD compute the loss themselves, and take the labels, which
tell prompt from answer, out of the batch first. How many prompts there are is counted
before a batch goes to an accelerator, and so is which tokens' logits the loss needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from axolotl.utils.logging import get_logger
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer

from axolotl_reft.training.collator import EditIndexCollator as PromptCounter
from axolotl_reft.training.labelled_logits import LabelledLogits, why_all_logits

LOG = get_logger(__name__)

_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
_COLLATORS = ("data_collator", "eval_data_collator")


def show_labels(trainer: Any) -> None:
    """Let every loss that ``trainer`` computes find its prompts by the batch's labels,
    also where the model is not given them."""
    tracker = trainer.model.get_base_model().loreft_hooks.state
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


def complete_batches(trainer: Any, labelled_logits: bool | None) -> None:
    """Let the batches of the training say how many prompts they have, and those of its
    evaluations too which tokens' logits their loss is computed from.

    In the loaders alone: axolotl's callbacks set attributes of the trainer's collators.
    Not of streamed data, which one process may read for all, laying tensors together.

    Args:
        labelled_logits: of labelled tokens alone, where the loss allows it (None and
            true, which warns where it does not); or of all.
    """
    reason = "it is off" if labelled_logits is False else _why_all_logits(trainer)
    if labelled_logits and reason:
        LOG.warning("loreft_labelled_logits: true has no effect: %s", reason)

    def completed(collate: Any) -> Any:
        return collate if reason else LabelledLogits(collate)

    def counted(collate: Any) -> Any:
        return PromptCounter.of(trainer.model, completed(collate))

    _collate(trainer, "train", counted)
    # Of the logits, metrics of one's own see those of every token.
    if trainer.compute_metrics is None:
        _collate(trainer, "eval", completed)


def _why_all_logits(trainer: Any) -> str | None:
    from axolotl.core.trainers import AxolotlTrainer

    left_to_model = (AxolotlTrainer.compute_loss, Trainer.compute_loss)
    method = getattr(trainer.compute_loss, "__func__", None)
    if method not in left_to_model or trainer.compute_loss_func:
        return f"{type(trainer).__name__} computes the loss itself"
    if trainer.label_smoother:
        return "label_smoothing_factor has the trainer compute the loss"
    mode = trainer.args.torch_compile_mode
    if mode in _CUDA_GRAPHS:
        return f"torch_compile_mode: {mode} makes CUDA graphs, each of one size"
    return why_all_logits(trainer.model.get_base_model())


def _collate(trainer: Any, which: str, complete: Callable[[Any], Any]) -> None:
    """Have the method that makes the trainer's loader of ``train`` or ``eval`` meet
    other collators."""
    make = getattr(trainer, f"get_{which}_dataloader")

    @wraps(make)
    def making(*args: Any, **kwargs: Any) -> Any:
        data = [*args, *kwargs.values()] or [getattr(trainer, f"{which}_dataset")]
        if isinstance(data[0], IterableDataset):
            return make(*args, **kwargs)
        found = {name: getattr(trainer, name, None) for name in _COLLATORS}
        collators = {name: one for name, one in found.items() if one is not None}
        for name, collate in collators.items():
            setattr(trainer, name, complete(collate))
        try:
            return make(*args, **kwargs)
        finally:
            for name, collate in collators.items():
                setattr(trainer, name, collate)

    setattr(trainer, f"get_{which}_dataloader", making)


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
