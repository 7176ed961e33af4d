"""Find the prompts in TRL's preference and reinforcement trainers.

These give the model ids and a mask, but not which tokens are answers: that is in
`completion_mask`, in the labels that ORPO and CPO concatenate, or in the number of
columns that GRPO generated. Their methods that call the model are wrapped to note it. A
forward of ids that no method noted is an error.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from axolotl_reft.plugin.labels import set_answers
from axolotl_reft.tuner.walk import interventions_of

LOG = get_logger(__name__)

_REFERENCE = "ref"


class Answers:
    """The answers in the batches that a trainer is about to forward."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._known: list[tuple[Tensor, Tensor]] = []
        self._columns: tuple[int, int] | None = None

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """The mask (B, T) or (1, T) of the answers in ``ids_BT``.

        Raises:
            ValueError: they are not of a batch the trainer was seen to prepare.
        """
        for known_BT, answer_BT in self._known:
            if known_BT is ids_BT:
                return answer_BT
        if self._columns is not None:
            columns, answers = self._columns
            if ids_BT.shape[1] == columns:
                place_1T = torch.arange(columns, device=ids_BT.device)[None]
                return place_1T >= columns - answers
        raise ValueError(
            "LoReFT cannot tell prompt from answer in a batch of shape "
            f"{tuple(ids_BT.shape)}, of which the trainer gave no completion mask. Use "
            "axolotl's own trainers, or edit every token with positions: all"
        )

    def masks(self, inputs: dict[str, Tensor], **_: Any) -> None:
        """Note a batch of DPO, or KTO, which has a second one for its KL term."""
        self._known = [
            (inputs[f"{kind}input_ids"], inputs[f"{kind}completion_mask"])
            for kind in ("", "KL_")
            if f"{kind}input_ids" in inputs
        ]

    def labels(self, concatenated: Mapping[str, Any]) -> None:
        """Note what ORPO and CPO concatenate from chosen and rejected answers."""
        ids_BT = concatenated["concatenated_input_ids"]
        self._known = [(ids_BT, concatenated["concatenated_labels"] != -100)]

    def columns(self, input_ids: Tensor, logits_to_keep: int, **_: Any) -> None:
        """Note a batch of GRPO, whose answers all begin in the same column."""
        self._columns = (input_ids.shape[1], logits_to_keep)


def note_answers(trainer: Any) -> None:
    """Let the adapter of the trainer's model find the answers of its batches.

    Raises:
        ValueError: the trainer is of an unknown class.
    """
    answers = Answers()
    if isinstance(trainer, (DPOTrainer, KTOTrainer)):
        for name in ("compute_loss", "compute_ref_log_probs"):
            _note_arguments(trainer, name, answers, answers.masks)
    elif isinstance(trainer, (ORPOTrainer, CPOTrainer)):
        concatenate = trainer.concatenated_inputs

        @wraps(concatenate)
        def noted(*args: Any, **kwargs: Any) -> Any:
            batch = concatenate(*args, **kwargs)
            answers.labels(batch)
            return batch

        # Patch: the labels are dropped before the model is called.
        trainer.concatenated_inputs = noted  # type: ignore[method-assign]
    elif isinstance(trainer, GRPOTrainer):
        for name in ("_get_per_token_logps_and_entropies", "_get_last_hidden_state"):
            _note_arguments(trainer, name, answers, answers.columns)
    else:
        raise ValueError(
            f"LoReFT does not know how {type(trainer).__name__} tells prompt from "
            "answer; use one of axolotl's own trainers"
        )
    set_answers(trainer.model, answers)


def _note_arguments(
    trainer: Any, name: str, answers: Answers, note: Callable[..., None]
) -> None:
    """Note the arguments of a trainer's method while it runs."""
    method = getattr(trainer, name)
    signature = inspect.signature(method)

    @wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        note(**signature.bind(*args, **kwargs).arguments)
        try:
            return method(*args, **kwargs)
        finally:
            answers.forget()

    # Patch: TRL does not pass on to the model which tokens are answers.
    setattr(trainer, name, noted)


def _evaluate_tokenized_rows(trainer: Any) -> None:
    evaluate = trainer.evaluate

    @wraps(evaluate)
    def evaluated(rows: Any = None, *, metric_key_prefix: str = "eval") -> Any:
        is_training_set = metric_key_prefix == "train"
        rows = trainer.train_dataset if is_training_set else trainer.eval_dataset
        return evaluate(rows, metric_key_prefix=metric_key_prefix)

    # Patch: axolotl passes ORPO and SimPO the rows as they were before TRL's
    # constructor tokenized them.
    trainer.evaluate = evaluated


def prepare_trainer(trainer: Any, saved: str | None, evaluates: bool) -> None:
    """Adapt a trainer that axolotl built for ``rl:``: answers, reference, dropout.

    Args:
        saved: directory of the adapter to resume from or to evaluate.
        evaluates: the model is evaluated and not trained.

    Raises:
        ValueError: as :func:`note_answers`.
    """
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
    if trainer.args.disable_dropout:
        _disable_dropout(model)


def _set_reference(model: PeftModel, saved: str | None) -> None:
    """Make the reference the adapter that training starts from, or the base.

    TRL takes the adapter "ref" if there is one, and else the base. For GRPO it copies
    the parameters of every adapter, also of a new one, and not the buffers of its
    rotations. For DPO, IPO and KTO axolotl does not load an adapter to start from.
    """
    if saved is None:
        if _REFERENCE in model.peft_config:
            model.delete_adapter(_REFERENCE)
        return
    tensors = load_peft_weights(saved, device="cpu")
    if _REFERENCE not in model.peft_config:
        model.add_adapter(_REFERENCE, model.peft_config["default"])
    for name in ("default", _REFERENCE):
        set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
    # Patch: with "ref" saved in a folder beside it, transformers would not find the
    # trained adapter when it resumes.
    model.__dict__["save_pretrained"] = partial(
        model.save_pretrained, selected_adapters=["default"]
    )


def _disable_dropout(model: PeftModel) -> None:
    """Disable the interventions' dropout, as TRL does with modules of torch's."""
    interventions = [
        found.intervention
        for adapter in model.peft_config
        for found in interventions_of(model, adapter)
    ]
    found = max(intervention.dropout_p for intervention in interventions)
    for intervention in interventions:
        intervention.dropout_p = 0.0
    if found:
        LOG.warning(
            "dropout: %s is not used: this trainer computes its loss without dropout "
            "(TRL's disable_dropout), here as with other adapters",
            found,
        )
