"""Logits of the tokens alone that the loss is computed from.

A causal model's head computes as many numbers for a token as its vocabulary has words,
for a token of a prompt too, and the loss then passes them over. In a small model with a
large vocabulary that is a fifth of a step, and in any model what its memory peaks at.
Which tokens have labels is known when a batch is collated; transformers' models compute
the logits of some tokens (``logits_to_keep``) and take labels that are shifted already
(``shift_labels``), so that the same loss is had for less.

Shapes: B batch, T tokens, K tokens that are kept.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

# GPUs multiply matrices in tiles; and a compiled model meets fewer different numbers.
_MULTIPLE = 8


@dataclass(frozen=True)
class LabelledLogits:
    """A data collator that keeps a model from computing logits that no loss looks at.

    For trainers that leave the loss to the model, as transformers' ``Trainer`` does:
    the output's ``logits`` are then those of ``logits_to_keep``, not of every token.

    Args:
        collate: the data collator whose batches have ``input_ids`` and ``labels``
            (B, T), −100 where there is none. ``logits_to_keep`` (K) and
            ``shift_labels`` (B, K) are added where that leaves out any token.
    """

    collate: Callable[..., Any]

    @classmethod
    def of(cls, model: Any, collate: Callable[..., Any]) -> LabelledLogits:
        """For a PEFT model.

        Raises:
            ValueError: the base model computes its loss from all logits.
        """
        if reason := why_all_logits(model.get_base_model()):
            raise ValueError(
                f"LabelledLogits: {reason}, so all logits are needed; use {collate} "
                "as it is"
            )
        return cls(collate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.collate(*args, **kwargs)
        batch.update(labelled_logits(batch))
        return batch


def labelled_logits(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a batch needs for the logits that its loss is computed from; nothing where
    these are all or none, or where it is no batch of tokens and their labels."""
    ids_BT, labels_BT = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids_BT, Tensor) or not isinstance(labels_BT, Tensor):
        return {}
    if labels_BT.ndim != 2 or labels_BT.shape != ids_BT.shape:
        return {}
    if "logits_to_keep" in batch or "shift_labels" in batch:
        return {}
    next_BT = pad(labels_BT, (0, 1), value=-100)[:, 1:]
    kept_T = (next_BT != -100).any(0)
    count = int(kept_T.sum())
    if not 0 < count <= len(kept_T) - _MULTIPLE:
        return {}
    others = (~kept_T).nonzero()[:, 0]
    kept_T[others[: -count % _MULTIPLE]] = True
    kept_K = kept_T.nonzero()[:, 0]
    return {"logits_to_keep": kept_K, "shift_labels": next_BT[:, kept_K]}


def why_all_logits(model: Any) -> str | None:
    """Why a transformers model's loss needs the logits of every token; None where the
    model computes it from those that are kept.

    Its own forward must take ``logits_to_keep`` and hand its further arguments to
    ``loss_function``, and that must take ``shift_labels``. None of it is declared
    anywhere, and a model that takes one and not the other would stop at the first
    batch; so its source is read.
    """
    name = type(model).__name__
    forward = inspect.unwrap(type(model).forward)
    if not forward.__module__.startswith("transformers.models."):
        return f"{name}'s forward is not transformers' own"
    if not _hands_arguments_to_loss(forward):
        return f"{name} does not compute its loss from the logits that it is asked for"
    if "shift_labels" not in inspect.signature(model.loss_function).parameters:
        return f"{name}'s loss does not take labels that are shifted"
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        return f"{name} is spread over several devices"
    return None


def _hands_arguments_to_loss(forward: Callable[..., Any]) -> bool:
    try:
        source = textwrap.dedent(inspect.getsource(forward))
    except OSError:  # installed without it
        return False
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    rest = function.args.kwarg
    if rest is None or "logits_to_keep" not in inspect.signature(forward).parameters:
        return False
    return any(
        keyword.arg is None and ast.unparse(keyword.value) == rest.arg
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        if ast.unparse(call.func) == "self.loss_function"
        for keyword in call.keywords
    )
