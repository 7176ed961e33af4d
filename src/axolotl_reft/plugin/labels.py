"""Complete a trainer's batches, and make their labels known to the adapter.

Label smoothing, EAFT and KD compute the loss themselves and take the labels, which
separate prompt and answer, out of the batch first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

from axolotl.utils.logging import get_logger
from peft import PeftModel
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer

from axolotl_reft.training.collators import (
    EditIndexCollator,
    LabelledLogits,
    why_all_logits,
)
from axolotl_reft.tuner.model import hooks_of

LOG = get_logger(__name__)

# Maps the ids (B, T) of a forward to the mask (B, T) or (1, T) of its answers.
FindAnswers = Callable[[Tensor], Tensor]
Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def set_answers(model: PeftModel, find: FindAnswers | None) -> FindAnswers | None:
    """Set how an adapter finds the answers without labels; return what was set."""
    hooks = hooks_of(model.get_base_model())
    assert hooks is not None, "a model with a LoReFT adapter"
    before, hooks.state.find_answers = hooks.state.find_answers, find
    return before


def note_answers_during(
    trainer: Trainer, name: str, find: Callable[..., FindAnswers | None]
) -> None:
    """Set the answers while a trainer's method runs, found by its arguments."""
    method = getattr(trainer, name)
    signature = inspect.signature(method)

    @wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).args
        before = set_answers(trainer.model, find(*given))
        try:
            return method(*args, **kwargs)
        finally:
            set_answers(trainer.model, before)

    # Patch: some methods do not tell the model which tokens are answers.
    setattr(trainer, name, noted)


def expose_labels(trainer: Trainer) -> None:
    """Let the adapter find the prompts by the batch's labels in every loss."""

    def find(model: Any, inputs: Mapping[str, Tensor], *_: Any) -> FindAnswers | None:
        labels_BT = inputs.get("labels")
        return None if labels_BT is None else partial(_answers_of, labels_BT)

    note_answers_during(trainer, "compute_loss", find)


def _answers_of(labels_BT: Tensor, ids_BT: Tensor) -> Tensor:
    if labels_BT.shape != ids_BT.shape[:2]:
        raise ValueError(
            f"LoReFT: the labels of the batch are {tuple(labels_BT.shape)}, but the "
            f"model got {tuple(ids_BT.shape[:2])} tokens; use positions: all, or a "
            "trainer that leaves tokens as they are"
        )
    return labels_BT != -100


def complete_batches(trainer: Trainer, labelled_logits: bool | None) -> None:
    """Add to batches what the loss and the adapter need (``axolotl_reft.training``).

    ``labelled_logits`` False computes all logits; True warns where the loss needs all.
    """
    reason = "it is off" if labelled_logits is False else _why_all_logits(trainer)
    if labelled_logits and reason:
        LOG.warning("loreft_labelled_logits: true has no effect: %s", reason)
    wrappers: list[Wrapper] = [] if reason else [LabelledLogits]
    # Metrics see every token's logits.
    if trainer.compute_metrics is None:
        _wrap_collator(trainer, "get_eval_dataloader", *wrappers)
    indices = partial(EditIndexCollator.of, trainer.model)
    _wrap_collator(trainer, "get_train_dataloader", *wrappers, indices)


def _why_all_logits(trainer: Trainer) -> str | None:
    from axolotl.core.trainers import AxolotlTrainer

    left_to_model = (AxolotlTrainer.compute_loss, Trainer.compute_loss)
    method = getattr(trainer.compute_loss, "__func__", None)
    if method not in left_to_model or trainer.compute_loss_func:
        return f"{type(trainer).__name__} computes the loss itself"
    if trainer.label_smoother:
        return "label_smoothing_factor has the trainer compute the loss"
    mode = trainer.args.torch_compile_mode
    if mode in ("reduce-overhead", "max-autotune"):
        return f"torch_compile_mode: {mode} makes CUDA graphs, each of one size"
    return why_all_logits(trainer.model.get_base_model())


def _wrap_collator(trainer: Trainer, name: str, *wrappers: Wrapper) -> None:
    make = getattr(trainer, name)

    @wraps(make)
    def make_wrapped(*args: Any, **kwargs: Any) -> Any:
        loader = make(*args, **kwargs)
        # Accelerate's loaders hold torch's.
        inner = getattr(loader, "base_dataloader", loader)
        # A loader may be made once for all evaluations. One process may read and slice
        # streamed data for all.
        wrapped = isinstance(inner.collate_fn, LabelledLogits | EditIndexCollator)
        if not wrapped and not isinstance(inner.dataset, IterableDataset):
            for wrap in wrappers:
                inner.collate_fn = wrap(inner.collate_fn)
        return loader

    # Patch: axolotl's callbacks set attributes of the trainer's collators, which must
    # stay as they are outside of the loaders.
    setattr(trainer, name, make_wrapped)
