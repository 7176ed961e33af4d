"""The prompt in TRL's preference and reinforcement trainers.

These give the model ids and a mask, and keep to themselves which tokens are answers: in
`completion_mask`, in the labels that ORPO and CPO concatenate, or in the number of
columns that GRPO generated. Their methods that call the model are listened to, on the
trainer itself, and the tracker is told (`PromptTracker.find_answers`). A forward of
theirs whose ids are not known is an error.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
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

from axolotl_reft.tuner.layer import LoreftDecoderLayer

LOG = get_logger(__name__)

_REFERENCE = "ref"


class Answers:
    """Which tokens are answers in the batches that a trainer is about to forward."""

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
                return torch.arange(columns, device=ids_BT.device)[None] >= (
                    columns - answers
                )
        raise ValueError(
            "LoReFT cannot tell prompt from answer in a batch of shape "
            f"{tuple(ids_BT.shape)} that the trainer gave the model: it is none of "
            "those whose completion mask was seen. Use axolotl's own trainers, or edit "
            "every token with positions: all"
        )

    def masks(self, inputs: dict[str, Tensor], **_: Any) -> None:
        """Of the batches of DPO and KTO; KTO has a second one, for its KL term."""
        self._known = [
            (inputs[f"{kind}input_ids"], inputs[f"{kind}completion_mask"])
            for kind in ("", "KL_")
            if f"{kind}input_ids" in inputs
        ]

    def labels(self, concatenated: dict[str, Tensor]) -> None:
        """Of what ORPO and CPO concatenate from chosen and rejected answers."""
        ids_BT = concatenated["concatenated_input_ids"]
        self._known = [(ids_BT, concatenated["concatenated_labels"] != -100)]

    def columns(self, input_ids: Tensor, logits_to_keep: int, **_: Any) -> None:
        """Of GRPO's batches, whose answers all begin in the same column."""
        self._columns = (input_ids.shape[1], logits_to_keep)


def tell_answers(trainer: Any, tracker: Any) -> None:
    """Let the tracker of the trainer's model know the answers of its batches.

    Raises:
        ValueError: the trainer is not one of those this knows how to listen to.
    """
    answers = Answers()
    if isinstance(trainer, (DPOTrainer, KTOTrainer)):
        _listen(trainer, "compute_loss", answers.masks, answers.forget)
        _listen(trainer, "compute_ref_log_probs", answers.masks, answers.forget)
    elif isinstance(trainer, (ORPOTrainer, CPOTrainer)):
        _listen_to_result(trainer, "concatenated_inputs", answers.labels)
    elif isinstance(trainer, GRPOTrainer):
        for name in ("_get_per_token_logps_and_entropies", "_get_last_hidden_state"):
            _listen(trainer, name, answers.columns, answers.forget)
    else:
        raise ValueError(
            f"LoReFT does not know how {type(trainer).__name__} tells prompt from "
            "answer; use one of axolotl's own trainers"
        )
    tracker.find_answers = answers


def _listen(
    trainer: Any, name: str, note: Callable[..., None], forget: Callable[[], None]
) -> None:
    """Note the arguments of a method for as long as it runs."""
    method = getattr(trainer, name)
    signature = inspect.signature(method)

    @wraps(method)
    def listened(*args: Any, **kwargs: Any) -> Any:
        note(**signature.bind(*args, **kwargs).arguments)
        try:
            return method(*args, **kwargs)
        finally:
            forget()

    setattr(trainer, name, listened)


def _listen_to_result(trainer: Any, name: str, note: Callable[[Any], None]) -> None:
    method = getattr(trainer, name)

    @wraps(method)
    def listened(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        note(result)
        return result

    setattr(trainer, name, listened)


def _evaluate_what_is_tokenized(trainer: Any) -> None:
    """`axolotl evaluate` hands ORPO and SimPO the rows that it gave their constructor,
    which tokenized them and expects those back."""
    evaluate = trainer.evaluate

    @wraps(evaluate)
    def evaluated(rows: Any = None, *, metric_key_prefix: str = "eval") -> Any:
        is_training_set = metric_key_prefix == "train"
        rows = trainer.train_dataset if is_training_set else trainer.eval_dataset
        return evaluate(rows, metric_key_prefix=metric_key_prefix)

    trainer.evaluate = evaluated


def prepare_trainer(trainer: Any, saved: str | None, evaluates: bool) -> None:
    """Make a trainer that axolotl built for ``rl:`` right for LoReFT.

    - The tracker is told the answers of its batches.
    - An evaluation is of rows that are tokenized.
    - The reference is the base, or the adapter that training starts from.
    - What is saved is the adapter.
    - TRL's `disable_dropout` holds for the interventions too.

    Args:
        trainer: with a model that has a LoReFT adapter.
        saved: directory of the adapter to go on from or to answer with.
        evaluates: the model is evaluated and not trained.

    Raises:
        ValueError: as :func:`tell_answers`.
    """
    if not isinstance(trainer.model, PeftModel):
        # `axolotl evaluate` hands DPO, IPO and KTO neither adapter nor configuration.
        assert evaluates and saved is not None
        trainer.model = PeftModel.from_pretrained(trainer.model, saved).eval()
        trainer.model_wrapped, trainer.ref_model = trainer.model, None
    model = trainer.model
    tell_answers(trainer, model.get_base_model().loreft_hooks.state)
    if evaluates and isinstance(trainer, (ORPOTrainer, CPOTrainer)):
        _evaluate_what_is_tokenized(trainer)
    _settle_reference(model, None if evaluates else saved)
    # axolotl ends by saving the model that it gave the trainer, which for DPO, IPO and
    # KTO is the base with the adapter inside: gigabytes that nothing can read.
    model.get_base_model().__dict__["save_pretrained"] = model.save_pretrained
    if trainer.args.disable_dropout:
        _disable_dropout(model)


def _settle_reference(model: PeftModel, saved: str | None) -> None:
    """Which adapter, or none, TRL computes the reference's probabilities with.

    It takes an adapter called "ref" if there is one and else none. For GRPO it makes
    one by copying parameters: also of a new adapter, whose edits are random and no
    reference; and without buffers, so with other rotations. For DPO, IPO and KTO
    axolotl passes only the configuration, so that an adapter to start from is not read.
    """
    if saved is None:
        if _REFERENCE in model.peft_config:
            model.delete_adapter(_REFERENCE)
        return
    numbers = load_peft_weights(saved, device="cpu")
    if _REFERENCE not in model.peft_config:
        model.add_adapter(_REFERENCE, model.peft_config["default"])
    for name in ("default", _REFERENCE):
        set_peft_model_state_dict(model, dict(numbers), adapter_name=name)
    # With "ref" in a folder of its own beside it, transformers would not read the
    # trained adapter when it resumes. What "ref" holds is in `saved`.
    model.__dict__["save_pretrained"] = partial(
        model.save_pretrained, selected_adapters=["default"]
    )


def _disable_dropout(model: PeftModel) -> None:
    """As TRL does with modules of torch's; an intervention's is a number."""
    layers = [m for m in model.modules() if isinstance(m, LoreftDecoderLayer)]
    interventions: list[Any] = [
        intervention
        for layer in layers
        for container in (layer.intv_0, layer.intv_1)
        for intervention in container.values()
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
