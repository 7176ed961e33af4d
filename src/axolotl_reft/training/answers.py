"""Tell the adapter which tokens of a trainer's batches are answers.

A causal model finds its prompts by its labels. Label smoothing, ``compute_loss_func``
and custom losses take the labels out of the batch before the model is called. Most of
TRL's trainers have none: the answers are in a completion mask, in the labels that ORPO
and CPO concatenate, or in the number of columns that GRPO and RLOO generated. They are
noted while the trainer's methods run.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from axolotl_reft.tuner.context import ModelState
from axolotl_reft.tuner.model import hooks_of
from axolotl_reft.tuner.prompt_sources import unknown_answers

# Maps the ids (B, T) of a forward to the mask (B, T) or (1, T) of its answers.
FindAnswers = Callable[[Tensor], Tensor]
# Ids with what tells their answers, and its value elsewhere; None where nothing does.
Batch = tuple[Tensor | None, Tensor | None, int]

# A trainer's models, by its attributes.
_MODELS = ("model", "ref_model")
# Its methods that call a model, by where they have the answers.
_BY_BATCH = ("compute_loss", "compute_ref_log_probs", "get_batch_loss_metrics")
_BY_COLUMNS = ("_get_per_token_logps_and_entropies", "_get_last_hidden_state")
# What tells the answers among a batch's ids, with its value at other tokens.
_MARKS = {"completion_mask": 0, "labels": -100}


def note_answers(trainer: Any) -> None:
    """Let the adapter find the answers in a trainer's batches.

    In one of TRL's, a training forward whose answers are not known is refused.
    """
    in_trl = any(c.__module__.split(".")[0] == "trl" for c in type(trainer).__mro__)
    if in_trl:
        for state in states_of(trainer):
            state.trainer = type(trainer).__name__
    by_batch = partial(_by_batch, trainer if in_trl else None)
    for names, find in ((_BY_BATCH, by_batch), (_BY_COLUMNS, answers_in_columns)):
        for name in names:
            if hasattr(trainer, name):
                _note_during(trainer, name, find)
    if hasattr(trainer, "concatenated_inputs"):
        _note_concatenated(trainer)


def states_of(trainer: Any) -> list[ModelState]:
    """Return the states of a trainer's models with LoReFT adapters that generate."""
    states = []
    for name in _MODELS:
        model: Any = getattr(trainer, name, None)
        if model is None:
            continue
        model = model._modules.get("policy", model)  # of PPO, beside a value model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        hooks = hooks_of(base)
        if hooks is not None and base.can_generate():
            states.append(hooks.state)
    return states


@contextmanager
def answers_found_by(trainer: Any, find: FindAnswers | None) -> Iterator[None]:
    """Set for a while how a trainer's models find the answers without labels."""
    states = states_of(trainer)
    before = [state.find_answers for state in states]
    for state in states:
        state.find_answers = find
    try:
        yield
    finally:
        for state, found_before in zip(states, before, strict=True):
            state.find_answers = found_before


def _note_during(
    trainer: Any, name: str, find: Callable[..., FindAnswers | None]
) -> None:
    """Set the answers while a trainer's method runs, found by its arguments."""
    method = getattr(trainer, name)
    signature = inspect.signature(method)

    @wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).args
        with answers_found_by(trainer, find(*given)):
            return method(*args, **kwargs)

    # Patch: the method does not tell the model which tokens are answers.
    setattr(trainer, name, noted)


def _note_concatenated(trainer: Any) -> None:
    concatenate = trainer.concatenated_inputs

    @wraps(concatenate)
    def noted(*args: Any, **kwargs: Any) -> Any:
        batch = concatenate(*args, **kwargs)
        ids_BT, labels_BT = (
            batch[f"concatenated_{k}"] for k in ("input_ids", "labels")
        )
        for state in states_of(trainer):
            state.find_answers = partial(_look_up, [(ids_BT, labels_BT, -100)])
        return batch

    # Patch: ORPO and CPO drop the labels before they call the model.
    trainer.concatenated_inputs = noted


def _by_batch(trl: Any, model: Any, inputs: Any, *_: Any) -> FindAnswers | None:
    """Find the answers of a batch's ids, of which KTO has a second kind for its KL
    term. Without any: refuse in a trainer of TRL's, or leave them to the model."""
    if not isinstance(inputs, Mapping):  # for a custom loss
        inputs = {}
    if trl is not None and "tool_mask" in inputs:
        _refuse_tools(trl)
    ids = [key for key in inputs if key.endswith("input_ids")]
    if not ids and {"prompt_ids", "completion_ids"} <= inputs.keys():
        parts = inputs["prompt_ids"] * 0, inputs["completion_ids"] * 0 + 1
        return partial(_look_up, [(None, torch.cat(parts, 1), 0)])
    kinds = [key.removesuffix("input_ids") for key in ids] or [""]
    batches = [_batch(inputs, kind) for kind in kinds]
    if trl is None and all(mark is None for _, mark, _ in batches):
        return None
    return partial(_look_up, batches)


def _refuse_tools(trainer: Any) -> None:
    """Refuse completions with what tools answered, which was a prompt when they were
    generated: the policy's forward is told of columns alone."""
    specs = [spec for s in states_of(trainer) for spec in s.adapters.values()]
    if not all(spec.positions.everywhere for spec in specs):
        raise ValueError(
            "GRPO with tools, environments or a rollout_func that returns env_mask: "
            "LoReFT cannot tell the tools' results in a completion from its answers; "
            "use positions: all, or rewards without tools"
        )


def _batch(inputs: Mapping[str, Any], kind: str) -> Batch:
    ids_BT = inputs.get(f"{kind}input_ids")
    for name, elsewhere in _MARKS.items():
        mark = inputs.get(f"{kind}{name}")
        # Labels in one dimension are a row's class.
        if isinstance(mark, Tensor) and mark.ndim == 2:
            return ids_BT, mark, elsewhere
    return ids_BT, None, 0


def _look_up(batches: Sequence[Batch], tokens: Tensor) -> Tensor:
    """Return the answers of a forward's tokens: ids, or embeddings of a lone batch."""
    found = [b for b in batches if b[0] is tokens] or list(batches)
    if len(found) == 1:
        _, mark, elsewhere = found[0]
        if mark is not None and mark.shape == tokens.shape[:2]:
            return mark != elsewhere
    raise unknown_answers(tokens)


def answers_in_columns(
    model: Any, input_ids: Tensor, attention_mask: Any, count: int, *_: Any
) -> FindAnswers:
    """Find the answers of GRPO, in the last columns of a batch and of its parts."""
    width = input_ids.shape[1]

    def find(ids_BT: Tensor) -> Tensor:
        if ids_BT.shape[1] != width:
            raise unknown_answers(ids_BT)
        return torch.arange(width, device=ids_BT.device)[None] >= width - count

    return find
