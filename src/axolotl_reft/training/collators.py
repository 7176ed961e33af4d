"""Data collators: the edited tokens found on the host, and logits where the loss is.

On an accelerator, counting edited tokens would make the host wait. The host knows them
from ids and labels alone; the model's hooks take their indices out of its arguments.
The loss ignores the logits of prompt tokens: in a small model with a large vocabulary
a fifth of a step, and in any model part of its memory's peak.

Shapes: B batch, T tokens, N edited positions, K tokens whose logits are kept.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from axolotl_reft.prompts.batch import labelled_spans
from axolotl_reft.prompts.spans import edit_indices
from axolotl_reft.settings.spec import AdapterSpec
from axolotl_reft.tuner.context import POSITIONS, OnHost
from axolotl_reft.tuner.model import hooks_of

# GPUs multiply matrices in tiles, and a compiled model gets fewer different shapes.
_MULTIPLE = 8
_ON_HOST = ("input_ids", "attention_mask", "position_ids", "labels")


@dataclass(frozen=True)
class EditIndexCollator:
    """A data collator that adds the indices of edited tokens to another one's batches.

    Added are the ``shape`` (B, T) and the ``indices`` (N,) into B·T of each adapter's
    interventions, to batches with ``input_ids`` and ``labels`` (B, T); and these and
    the batch's tensors ``on_host``, since what a forward in two parts computes depends
    on them.

    Args:
        collate: the other collator.
        adapters: settings of the adapters that are trained; :meth:`of` a model's.
    """

    collate: Callable[..., Any]
    adapters: Mapping[str, AdapterSpec]

    @classmethod
    def of(cls, model: Any, collate: Callable[..., Any]) -> EditIndexCollator:
        """Make one for a PEFT model with LoReFT adapters."""
        hooks = hooks_of(model.get_base_model())
        assert hooks is not None, "a model with a LoReFT adapter"
        return cls(collate, dict(hooks.state.adapters))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch, indices = self.collate(*args, **kwargs), {}
        for name, spec in self.adapters.items():
            if spec.positions.everywhere:
                continue
            spans = labelled_spans(batch, spec.turns)
            if spans is None:
                return batch
            indices[name] = edit_indices(spans, spec.positions, spec.tied).sides
        if indices:
            shape = tuple(batch["input_ids"].shape[:2])
            tensors = {name: batch[name] for name in _ON_HOST if name in batch}
            on_host = OnHost(tensors, indices)
            added = {"shape": shape, "indices": indices, "on_host": on_host}
            batch[POSITIONS] = added
        return batch


@dataclass(frozen=True)
class LabelledLogits:
    """A data collator that asks the model for the logits of labelled tokens alone.

    For trainers that leave the loss to the model, as transformers' ``Trainer`` does.
    Where tokens can be left out, ``logits_to_keep`` (K) and ``shift_labels`` (B, K) are
    added to the batch, and the output's ``logits`` are those of K tokens.

    Args:
        collate: the data collator whose batches have ``input_ids`` and ``labels``
            (B, T), −100 for none.
    """

    collate: Callable[..., Any]

    @classmethod
    def of(cls, model: Any, collate: Callable[..., Any]) -> LabelledLogits:
        """Make one for a PEFT model.

        Raises:
            ValueError: the base model computes its loss from all logits.
        """
        if reason := why_all_logits(model.get_base_model()):
            raise ValueError(
                f"LabelledLogits: {reason}, so all logits are needed; use {collate}"
            )
        return cls(collate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.collate(*args, **kwargs)
        batch.update(labelled_logits(batch))
        return batch


def labelled_logits(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the batch's ``logits_to_keep`` and ``shift_labels``.

    Empty where all tokens or none are needed, or without ids and labels of one shape.
    """
    ids_BT, labels_BT = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids_BT, Tensor) or not isinstance(labels_BT, Tensor):
        return {}
    is_prepared = "logits_to_keep" in batch or "shift_labels" in batch
    if is_prepared or labels_BT.ndim != 2 or labels_BT.shape != ids_BT.shape:
        return {}
    next_BT = pad(labels_BT, (0, 1), value=-100)[:, 1:]
    kept_T = (next_BT != -100).any(0)
    count = int(kept_T.sum())
    if not 0 < count <= len(kept_T) - _MULTIPLE:
        return {}
    kept_T[(~kept_T).nonzero()[: -count % _MULTIPLE]] = True
    kept_K = kept_T.nonzero()[:, 0]
    return {"logits_to_keep": kept_K, "shift_labels": next_BT[:, kept_K]}


def why_all_logits(model: Any) -> str | None:
    """Return why a transformers model's loss needs the logits of every token, or None.

    Its forward must take ``logits_to_keep`` and pass its further arguments to
    ``loss_function``, and that must take ``shift_labels``. Only its source tells.
    """
    name = type(model).__name__
    forward = inspect.unwrap(type(model).forward)
    if not forward.__module__.startswith("transformers.models."):
        return f"{name}'s forward is not transformers' own"
    if not _hands_arguments_to_loss(forward):
        return f"{name} does not compute its loss from the logits that it is asked for"
    if "shift_labels" not in inspect.signature(model.loss_function).parameters:
        return f"{name}'s loss does not take labels that are shifted"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return f"{name} is spread over several devices"
    return None


def _hands_arguments_to_loss(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters
    rest = [p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    if not rest or "logits_to_keep" not in parameters:
        return False
    try:
        source = inspect.getsource(forward)
    except OSError:  # installed without it
        return False
    call = rf"self\.loss_function\((?:[^()]|\([^()]*\))*\*\*{rest[0]}\b"
    return re.search(call, source) is not None
