"""Complete a trainer's batches, and make their labels known to the adapter.

Label smoothing, EAFT and KD compute the loss themselves and take the labels, which
separate prompt and answer, out of the batch first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from axolotl.utils.logging import get_logger
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer

from axolotl_reft.training.collator import EditIndexCollator
from axolotl_reft.training.labelled_logits import LabelledLogits, why_all_logits
from axolotl_reft.tuner.model import hooks_of

LOG = get_logger(__name__)

_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
_COLLATORS = ("data_collator", "eval_data_collator")

# Maps the ids (B, T) of a forward to the mask (B, T) or (1, T) of its answers.
FindAnswers = Callable[[Tensor], Tensor]


def set_answers(model: Any, find_answers: FindAnswers | None) -> FindAnswers | None:
    """Set how the adapter of a PEFT model finds the answers where it gets no labels.

    Returns:
        The function that was set before.
    """
    hooks = hooks_of(model.get_base_model())
    assert hooks is not None, "a model with a LoReFT adapter"
    state = hooks.state
    before, state.find_answers = state.find_answers, find_answers
    return before


def show_labels(trainer: Any) -> None:
    """Let the adapter find the prompts by the batch's labels in every loss."""
    compute_loss = trainer.compute_loss

    @wraps(compute_loss)
    def with_labels(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.get("labels")
        if labels is None:
            return compute_loss(model, inputs, *args, **kwargs)
        before = set_answers(trainer.model, partial(_answers_of, labels))
        try:
            return compute_loss(model, inputs, *args, **kwargs)
        finally:
            set_answers(trainer.model, before)

    # Patch: some losses do not pass the labels to the model.
    trainer.compute_loss = with_labels


def _answers_of(labels_BT: Tensor, ids_BT: Tensor) -> Tensor:
    if labels_BT.shape != ids_BT.shape[:2]:
        raise ValueError(
            f"LoReFT: the labels of the batch are {tuple(labels_BT.shape)}, and the "
            f"model got {tuple(ids_BT.shape[:2])} tokens, so it cannot know the "
            "prompts; use positions: all, or a trainer that leaves tokens as they are"
        )
    return labels_BT != -100


def complete_batches(trainer: Any, labelled_logits: bool | None) -> None:
    """Wrap the trainer's collators in those of ``axolotl_reft.training``.

    Training batches get the adapter's prompts; they and evaluation batches get the
    tokens whose logits the loss needs.

    Args:
        labelled_logits: True to warn where the loss needs all logits, None to compute
            all of them silently there, False to compute all everywhere.
    """
    reason = "it is off" if labelled_logits is False else _why_all_logits(trainer)
    if labelled_logits and reason:
        LOG.warning("loreft_labelled_logits: true has no effect: %s", reason)
    wrappers: list[Callable[[Any], Any]] = [] if reason else [LabelledLogits]
    # Metrics see every token's logits.
    if trainer.compute_metrics is None:
        _wrap_collators(trainer, "eval", wrappers)
    count = partial(EditIndexCollator.of, trainer.model)
    _wrap_collators(trainer, "train", [*wrappers, count])


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


def _wrap_collators(
    trainer: Any, split: str, wrappers: list[Callable[[Any], Any]]
) -> None:
    """Wrap the collators of the ``train`` or ``eval`` loader while it is made.

    Streamed data is left alone: one process may read and slice it for all.
    """
    make = getattr(trainer, f"get_{split}_dataloader")

    @wraps(make)
    def make_wrapped(*args: Any, **kwargs: Any) -> Any:
        data = [*args, *kwargs.values()] or [getattr(trainer, f"{split}_dataset")]
        if isinstance(data[0], IterableDataset):
            return make(*args, **kwargs)
        before = {name: getattr(trainer, name, None) for name in _COLLATORS}
        try:
            for name, collate in before.items():
                for wrap in wrappers if collate is not None else ():
                    collate = wrap(collate)
                    setattr(trainer, name, collate)
            return make(*args, **kwargs)
        finally:
            for name, collate in before.items():
                if collate is not None:
                    setattr(trainer, name, collate)

    # Patch: axolotl's callbacks set attributes of the trainer's collators, which must
    # stay as they are outside of the loaders.
    setattr(trainer, f"get_{split}_dataloader", make_wrapped)
