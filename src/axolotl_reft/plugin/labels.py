"""Complete a trainer's batches with what the loss and the adapter need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from axolotl.utils.logging import get_logger
from torch.utils.data import IterableDataset
from transformers import Trainer

from axolotl_reft.training.collators import (
    EditIndexCollator,
    LabelledLogits,
    why_all_logits,
)

LOG = get_logger(__name__)

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def complete_batches(trainer: Trainer, labelled_logits: bool | None) -> None:
    """Wrap the collators of a trainer's loaders (``axolotl_reft.training``).

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
    # Beneath what notes the batch's answers.
    method = getattr(trainer.compute_loss, "__wrapped__", trainer.compute_loss)
    if (
        getattr(method, "__func__", None) not in left_to_model
        or trainer.compute_loss_func
    ):
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
