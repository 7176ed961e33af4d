"""Adapt TRL's preference and reinforcement trainers as axolotl builds them."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from transformers import Trainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from axolotl_reft.training.answers import note_answers
from axolotl_reft.training.trainers import disable_dropout


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
        note_answers(trainer)
    model = trainer.model
    if evaluates and isinstance(trainer, (ORPOTrainer, CPOTrainer)):
        _evaluate_tokenized_rows(trainer)
    _set_reference(model, None if evaluates else saved)
    # Patch: axolotl saves the model that it gave the trainer, which for DPO, IPO and
    # KTO is the whole base with the adapter inside.
    model.get_base_model().__dict__["save_pretrained"] = model.save_pretrained
    if trainer.args.disable_dropout:
        disable_dropout(model)  # of the reference


def _set_reference(model: PeftModel, saved: str | None) -> None:
    """Make the reference the adapter that training starts from, or the base.

    TRL takes the adapter "ref" if there is one, and else the base. For GRPO it makes
    a copy of every adapter, also of a new one. For DPO, IPO and KTO axolotl does not
    load an adapter to start from.
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
