"""Find the prompts in TRL's preference and reinforcement trainers.

They do not tell the model which tokens are answers: that is in `completion_mask`, in
the labels that ORPO and CPO concatenate, or in the number of columns that GRPO
generated. It is noted while they call the model; a forward of other ids is an error.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from axolotl_reft.plugin.labels import FindAnswers, note_answers_during, set_answers
from axolotl_reft.tuner.context import prompt_turns
from axolotl_reft.tuner.layer import interventions_of
from axolotl_reft.tuner.model import hooks_of

LOG = get_logger(__name__)


def note_answers(trainer: Trainer) -> None:
    """Let the adapter find the answers in the batches of one of TRL's trainers."""
    if isinstance(trainer, (DPOTrainer, KTOTrainer)):
        for name in ("compute_loss", "compute_ref_log_probs"):
            note_answers_during(trainer, name, _by_masks)
    elif isinstance(trainer, (ORPOTrainer, CPOTrainer)):
        concatenate = trainer.concatenated_inputs

        def noted(*args: Any, **kwargs: Any) -> Any:
            batch = concatenate(*args, **kwargs)
            answer_BT = batch["concatenated_labels"] != -100
            batches = [(batch["concatenated_input_ids"], answer_BT)]
            set_answers(trainer.model, partial(_look_up, batches))
            return batch

        # Patch: the labels are dropped before the model is called.
        trainer.concatenated_inputs = noted  # type: ignore[method-assign]
    elif isinstance(trainer, GRPOTrainer):
        for name in ("_get_per_token_logps_and_entropies", "_get_last_hidden_state"):
            note_answers_during(trainer, name, answers_in_columns)
        hooks = hooks_of(trainer.model.get_base_model())
        assert hooks is not None, "a model with a LoReFT adapter"
        if prompt_turns(hooks.state.adapters):
            note_answers_during(trainer, "compute_loss", _refuse_tools)
    else:
        raise ValueError(
            f"LoReFT does not know how {type(trainer).__name__} tells prompt from "
            "answer; use one of axolotl's own trainers"
        )
    set_answers(trainer.model, partial(_look_up, []))


def _by_masks(model: Any, inputs: Mapping[str, Tensor], *_: Any) -> FindAnswers:
    """Find the answers of DPO, and of KTO, which has a second batch for its KL term."""
    kinds = [kind for kind in ("", "KL_") if f"{kind}input_ids" in inputs]
    batches = [(inputs[f"{k}input_ids"], inputs[f"{k}completion_mask"]) for k in kinds]
    return partial(_look_up, batches)


def _look_up(batches: Sequence[tuple[Tensor, Tensor]], ids_BT: Tensor) -> Tensor:
    for known_BT, answer_BT in batches:
        if known_BT is ids_BT:
            return answer_BT
    raise ValueError(
        "LoReFT cannot tell prompt from answer in a batch of shape "
        f"{tuple(ids_BT.shape)}; use axolotl's own trainers, or positions: all"
    )


def answers_in_columns(
    model: Any, input_ids: Tensor, attention_mask: Any, count: int, *_: Any
) -> FindAnswers:
    """Find the answers of GRPO, in the last columns of a batch and of its parts."""
    width = input_ids.shape[1]

    def find(ids_BT: Tensor) -> Tensor:
        if ids_BT.shape[1] != width:
            return _look_up([], ids_BT)
        return torch.arange(width, device=ids_BT.device)[None] >= width - count

    return find


def _refuse_tools(model: Any, inputs: Mapping[str, Any], *_: Any) -> FindAnswers:
    """Refuse GRPO's completions with what tools answered, which was a prompt when they
    were generated: the policy's forward is told of columns alone."""
    if "tool_mask" in inputs:
        raise ValueError(
            "GRPO with tools, environments or a rollout_func that returns env_mask: "
            "LoReFT cannot tell the tools' results in a completion from its answers; "
            "use positions: all, or rewards without tools"
        )
    return partial(_look_up, [])


def _evaluate_tokenized_rows(trainer: Any) -> None:
    evaluate = trainer.evaluate

    def evaluated(rows: Any = None, *, metric_key_prefix: str = "eval") -> Any:
        is_training_set = metric_key_prefix == "train"
        rows = trainer.train_dataset if is_training_set else trainer.eval_dataset
        return evaluate(rows, metric_key_prefix=metric_key_prefix)

    # Patch: axolotl passes ORPO and SimPO the rows as they were before TRL's
    # constructor tokenized them.
    trainer.evaluate = evaluated


def prepare_trainer(trainer: Trainer, saved: str | None, evaluates: bool) -> None:
    """Adapt a trainer for ``rl:`` that starts from, or evaluates, a saved adapter."""
    if not isinstance(trainer.model, PeftModel):
        # Patch: `axolotl evaluate` gives DPO, IPO and KTO the base without an adapter.
        assert evaluates and saved is not None
        trainer.model = PeftModel.from_pretrained(trainer.model, saved).eval()
        trainer.model_wrapped, trainer.ref_model = trainer.model, None
    model = trainer.model
    note_answers(trainer)
    if evaluates and isinstance(trainer, (ORPOTrainer, CPOTrainer)):
        _evaluate_tokenized_rows(trainer)
    _set_reference(model, None if evaluates else saved)
    # Patch: axolotl saves the model that it gave the trainer, which for DPO, IPO and
    # KTO is the whole base with the adapter inside.
    model.get_base_model().__dict__["save_pretrained"] = model.save_pretrained
    # TRL's disable_dropout finds torch's modules alone.
    dropout = model.peft_config["default"].dropout
    if dropout and trainer.args.disable_dropout:
        for adapter in model.peft_config:
            for found in interventions_of(model, adapter):
                found.intervention.dropout_p = 0.0
        LOG.warning("dropout: %s is not used, by TRL's disable_dropout", dropout)


def _set_reference(model: PeftModel, saved: str | None) -> None:
    """Make the reference the adapter that training starts from, or the base.

    TRL takes the adapter "ref" if there is one, and else the base. For GRPO it copies
    the parameters of every adapter, also of a new one, and not the buffers of its
    rotations. For DPO, IPO and KTO axolotl does not load an adapter to start from.
    """
    if saved is None:
        if "ref" in model.peft_config:
            model.delete_adapter("ref")
        return
    if "ref" not in model.peft_config:
        model.add_adapter("ref", model.peft_config["default"])
    tensors = load_peft_weights(saved, device="cpu")
    for name in ("default", "ref"):
        set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
    # Patch: with "ref" saved in a folder beside it, transformers would not find the
    # trained adapter when it resumes.
    model.__dict__["save_pretrained"] = partial(
        model.save_pretrained, selected_adapters=["default"]
    )
