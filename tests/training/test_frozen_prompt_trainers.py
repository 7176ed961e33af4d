"""Trainers compute in two parts by themselves, with the losses of the plain forward."""

import pytest
import torch
from conftest import build_adapter, build_model, move_parameters
from transformers import Trainer, TrainingArguments, set_seed
from trl_trainers import build_trainer

from axolotl_reft import use_frozen_prompt
from axolotl_reft.tuner import frozen_base
from axolotl_reft.tuner.frozen_prompt import FrozenPrompt
from axolotl_reft.tuner.model import hooks_of

STEPS = 4
# The 8 prompts of TRL's rows; or one for each four answers, of which GRPO takes two
# steps.
TRL_CASES = {
    "sft": ({}, 8),
    "smoothed": ({}, 8),
    "dpo": ({}, 8),
    "dpo, from an adapter": ({"loaded": True}, 8),
    # Kept when the trainer is made, which computes the reference.
    "dpo, the reference ahead": ({"precompute_ref_log_probs": True}, 0),
    "dpo, ipo": ({"loss_type": "ipo"}, 8),
    "kto": ({}, 8),
    "kto, from an adapter": ({"loaded": True}, 8),
    "orpo": ({}, 8),
    "cpo, simpo": ({"loss_type": "simpo", "cpo_alpha": 0.0}, 8),
    "tpo": ({}, 8),
    "grpo": ({}, STEPS // 2),
    "grpo, from an adapter": ({"loaded": True}, STEPS // 2),
    "rloo": ({}, STEPS),
}


@pytest.fixture(autouse=True)
def a_pass_takes_no_time(monkeypatch):
    """Models are tiny, and would never be worth it. Nor is the base compared with
    itself, whose forwards would count."""
    monkeypatch.setattr(frozen_base, "_FLOPS_OF_A_PASS", {"cpu": 0})
    monkeypatch.setattr(frozen_base, "_SAVED", 0.0)
    monkeypatch.setattr(FrozenPrompt, "_check_base", lambda *args: "")


def hooks_in(model):
    return hooks_of(model.get_base_model())


def forwards_of(model):
    """Rows, and whether edited tokens are looked for, of each forward of the layers
    outside of ``generate``."""
    hooks, seen = hooks_in(model), []
    thread = hooks.state.thread

    def note(layer, args, output):
        if thread.generation is None:
            seen.append((args[0].shape[0], thread.context.find_spans is not None))

    hooks.model.get_submodule(hooks.layers)[0].register_forward_hook(note)
    return seen


def numbers_of(model):
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


def trained(trainer):
    """Losses of steps and of an evaluation, the parameters, and all forwards."""
    seen = forwards_of(trainer.model)
    set_seed(0)
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    steps = list(seen)
    losses.append(trainer.evaluate()["eval_loss"])
    return losses, numbers_of(trainer.model), steps


@pytest.mark.parametrize("case", list(TRL_CASES))
def test_trl_computes_each_prompt_once_with_the_same_losses(tmp_path, case):
    changes, prompts = TRL_CASES[case]
    runs = []
    for frozen_prompt in (False, "auto"):
        set_seed(0)
        trainer = build_trainer(
            case.partition(",")[0],
            tmp_path,
            positions="l3",
            max_steps=STEPS,
            learning_rate=0.05,
            logging_steps=1,
            **changes,
        )
        move_parameters(trainer.model, 0.3)
        if frozen_prompt is False:
            use_frozen_prompt(trainer.model, False)
        runs.append(trained(trainer))
    (expected, numbers, plain), (losses, got, in_parts) = runs
    assert len(set(expected)) > 2 and all(finds for _, finds in plain)
    assert losses == pytest.approx(expected, abs=2e-6, rel=2e-6)
    torch.testing.assert_close(got, numbers, atol=1e-5, rtol=1e-4)
    # Of chosen and rejected, of references, of KTO's pairs, of a group, of two epochs.
    assert sum(rows for rows, finds in in_parts if not finds) == prompts
    assert [finds for _, finds in in_parts].count(True) == len(plain)


@torch.no_grad()
def test_hidden_states_for_a_fused_loss_are_those_of_the_plain_forward(
    tmp_path, tokens
):
    """What GRPO asks for with Liger's loss, which needs a GPU."""
    trainer = build_trainer("grpo", tmp_path, positions="l3")
    model, ids = trainer.model, tokens(3, 14) % 26 + 4
    rows, found = forwards_of(model), []
    for frozen_prompt in (False, True):
        use_frozen_prompt(model, frozen_prompt)
        mask = torch.ones_like(ids)
        found.append(trainer._get_last_hidden_state(model, ids, mask, 4))
    assert [finds for _, finds in rows] == [True, False, True]
    torch.testing.assert_close(*found)


def build_batches(tokens):
    rows = tokens(8, 14)
    labels = rows.where(torch.arange(14) >= 11, -100)
    return [{"input_ids": i, "labels": n} for i, n in zip(rows, labels, strict=True)]


def build_plain(directory, tokens, kind=Trainer, model=None, **settings):
    if model is None:
        model = build_adapter(build_model(), positions="l3").train()
    rows = build_batches(tokens)
    arguments = {
        "use_cpu": True, "report_to": [], "learning_rate": 0.05, "max_steps": STEPS,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
        "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
    } | settings  # fmt: skip
    return kind(
        model,
        TrainingArguments(directory, **arguments),
        train_dataset=rows,
        eval_dataset=rows[:4],
    )


class MeanOfProbabilities(Trainer):
    """Computes a loss of its own from the logits of a model without labels."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs)
        logps = outputs.logits[:, :-1].log_softmax(-1)
        logps = logps.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        loss = -logps[labels != -100].exp().mean()
        return (loss, outputs) if return_outputs else loss


PLAIN_CASES = {
    "plain": (Trainer, {}),
    "evaluated at each step": (Trainer, {"eval_strategy": "steps", "eval_steps": 1}),
    "a loss of its own": (MeanOfProbabilities, {}),
    "label smoothing": (Trainer, {"label_smoothing_factor": 0.1}),
    "accumulated": (Trainer, {"gradient_accumulation_steps": 2}),
    "checkpointed": (Trainer, {"gradient_checkpointing": True}),
    "bfloat16": (Trainer, {"bf16": True}),
}


@pytest.mark.parametrize("case", list(PLAIN_CASES))
def test_transformers_trainer_has_the_same_losses(tmp_path, tokens, case):
    kind, settings = PLAIN_CASES[case]
    runs = []
    for frozen_prompt in (False, "auto"):
        trainer = build_plain(tmp_path, tokens, kind, **settings)
        if frozen_prompt is False:
            use_frozen_prompt(trainer.model, False)
        runs.append(trained(trainer))
    (expected, numbers, _), (losses, got, in_parts) = runs
    far = 1000 if case == "bfloat16" else 1
    assert losses == pytest.approx(expected, abs=far * 2e-6, rel=far * 2e-6)
    torch.testing.assert_close(got, numbers, atol=far * 1e-5, rtol=far * 1e-4)
    assert sum(rows for rows, finds in in_parts if not finds) == 8


def test_a_choice_that_was_made_before_the_trainer_stays(tmp_path, tokens):
    model = build_adapter(build_model(), positions="l3").train()
    hooks = hooks_in(model)
    use_frozen_prompt(model, True, "3MB")
    chosen = hooks.frozen_prompt
    assert build_plain(tmp_path, tokens, model=model).model is model
    assert hooks.frozen_prompt is chosen and chosen.kept.limit == 3_000_000
    use_frozen_prompt(model, False)
    build_plain(tmp_path, tokens, model=model)
    assert hooks.frozen_prompt is None


def test_each_trainer_decides_anew_where_nothing_was_chosen(tmp_path, tokens):
    model = build_adapter(build_model(), positions="f2+l3").train()
    build_plain(tmp_path, tokens, model=model)
    assert hooks_in(model).frozen_prompt is None
    model = build_adapter(model.unload(), positions="l3").train()
    build_plain(tmp_path, tokens, model=model)
    assert hooks_in(model).frozen_prompt is not None


@pytest.mark.filterwarnings("ignore:LoReFT. every token of the first batch")
def test_with_true_a_batch_without_preambles_is_no_error(tmp_path, tokens):
    model = build_adapter(build_model(), positions="l3").train()
    told = []
    use_frozen_prompt(model, True, tell=told.append)
    ids = tokens(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    padding = torch.zeros_like(ids)
    model(input_ids=ids, labels=ids * 0 - 100, attention_mask=padding)
    assert told == [
        "frozen prompt: computed with the rest, since too few tokens are before the "
        "first edited one"
    ]
