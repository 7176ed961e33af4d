"""TRL's and transformers' trainers, without axolotl, find the prompts by themselves."""

from types import SimpleNamespace

import pytest
import torch
from conftest import build_adapter, build_model, move_parameters
from peft.utils import get_peft_model_state_dict
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from trl_trainers import TRAINERS, build_trainer

from axolotl_reft import LoreftConfig

TOLERANCE = 1e-5
REFUSED = ("online_dpo",)
SUPPORTED = [name for name in TRAINERS if name not in REFUSED]


def disturb(model):
    torch.manual_seed(3)
    move_parameters(model, 0.3)


def forwards_during(trainer, run):
    """Every forward while ``run()``, but those of ``generate``."""
    model, seen = trainer.model.get_base_model(), []
    layer = model.model.layers[0]

    def note(module, args, kwargs, output):
        if model.loreft_hooks.state.thread.generation is None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            mask = kwargs["attention_mask"].bool()
            edited, trains = not layer.disable_adapters, torch.is_grad_enabled()
            adapter = layer.active_adapters[0]
            logits = output.logits.detach().clone()
            seen.append(SimpleNamespace(**locals()))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return seen


@torch.no_grad()
def assert_logits_of_rows_alone(model, forward, colon):
    """Each row's logits are those of a forward of it alone with labels."""
    assert ((forward.ids == colon) & forward.mask)[:, :-1].any(), "a row has an answer"
    for row, mask in enumerate(forward.mask):
        tokens = forward.ids[row][mask]
        prompt = (tokens == colon).nonzero()[0].item() + 1
        labels = tokens.where(torch.arange(len(tokens)) >= prompt, -100)
        expected = model(tokens[None], labels=labels[None]).logits[0]
        kept = mask[-forward.logits.shape[1] :]
        got = forward.logits[row][kept]
        assert (got - expected[-len(got) :]).abs().max() < TOLERANCE


def assert_forwards_are_right(trainer, forwards):
    model = trainer.model.eval()
    colon = trainer.processing_class.convert_tokens_to_ids(":")
    for forward in forwards:
        if forward.edited:
            model.set_adapter(forward.adapter)
            assert_logits_of_rows_alone(model, forward, colon)
            continue
        kept = forward.logits.shape[1]
        with model.disable_adapter(), torch.no_grad():
            same = model(forward.ids, forward.mask.long(), logits_to_keep=kept)
        assert (same.logits - forward.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_forward_is_that_of_its_rows_alone(tmp_path, name):
    trainer = build_trainer(name, tmp_path)
    disturb(trainer.model)
    trained = forwards_during(trainer, trainer.train)
    evaluated = forwards_during(trainer, trainer.evaluate)
    assert any(forward.trains and forward.edited for forward in trained)
    assert any(forward.edited for forward in evaluated)
    assert_forwards_are_right(trainer, trained + evaluated)


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo", "rloo"])
def test_the_reference_of_a_loaded_adapter_is_its_start(tmp_path, name):
    trainer = build_trainer(name, tmp_path, loaded=True)
    model = trainer.model
    start, reference = (
        get_peft_model_state_dict(model, adapter_name=adapter)
        for adapter in ("default", "ref")
    )
    assert any("rotation_base" in key for key in start)
    assert start.keys() == reference.keys()
    assert all(torch.equal(start[key], reference[key]) for key in start)
    disturb(model)
    forwards = forwards_during(trainer, trainer.train)
    assert {forward.adapter for forward in forwards} == {"default", "ref"}
    assert_forwards_are_right(trainer, forwards)


def test_a_reference_that_is_computed_before_the_training_is_the_same(tmp_path):
    losses = []
    for ahead in (False, True):
        trainer = build_trainer(
            "dpo", tmp_path, loaded=True, precompute_ref_log_probs=ahead
        )
        disturb(trainer.model)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1])


def test_an_adapter_that_is_called_ref_keeps_its_own_numbers(tmp_path):
    model = build_adapter(build_model(vocab_size=31, eos_token_id=2), rank=4)
    model.add_adapter("ref", LoreftConfig(task_type="CAUSAL_LM", rank=4))
    own = {
        k: v.clone()
        for k, v in get_peft_model_state_dict(model, adapter_name="ref").items()
    }
    Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    kept = get_peft_model_state_dict(model, adapter_name="ref")
    assert all(torch.equal(kept[key], own[key]) for key in own)


def test_loss_and_gradients_of_dft_are_those_written_by_hand(tmp_path):
    trainer = build_trainer("dft", tmp_path)
    model = trainer.model.train()
    disturb(model)
    batch = next(iter(trainer.get_train_dataloader()))
    got = trainer.compute_loss(model, dict(batch))
    logits = model(**batch).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    is_answer = labels != -100
    logps = logits.log_softmax(-1)[is_answer]
    logps = logps.gather(1, labels[is_answer][:, None])
    expected = -(logps.exp().detach() * logps).mean()
    torch.testing.assert_close(got, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(got, trained), torch.autograd.grad(expected, trained)
    )


@torch.no_grad()
def test_hidden_states_for_a_fused_loss_are_of_the_same_prompts(tmp_path, tokens):
    """What GRPO asks for with Liger's loss, which needs a GPU."""
    trainer = build_trainer("grpo", tmp_path)
    model, ids = trainer.model, tokens(3, 9) % 26 + 4
    hidden = trainer._get_last_hidden_state(model, ids, torch.ones_like(ids), 4)
    labels = ids.where(torch.arange(9) >= 5, -100)
    expected = model(ids, labels=labels).logits[:, 4:-1]
    got = model.get_output_embeddings()(hidden)
    assert (got - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", REFUSED)
def test_a_trainer_whose_answers_are_unknown_is_refused_before_a_step(tmp_path, name):
    trainer = build_trainer(name, tmp_path, learning_rate=1.0)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(ValueError, match="OnlineDPOTrainer has neither labels nor"):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))
    build_trainer(name, tmp_path, positions="all").train()


def test_text_of_which_every_token_is_trained_has_no_prompt(tmp_path):
    trainer = build_trainer("sft", tmp_path, completion_only_loss=False)
    with pytest.warns(UserWarning, match="every token of the first batch is trained"):
        trainer.train()


def test_after_its_training_a_model_takes_a_text_for_a_prompt(tmp_path, tokens):
    trainer = build_trainer("orpo", tmp_path)
    ids, model = tokens(2, 9) % 26, trainer.model.eval()
    expected = model(ids).logits
    trainer.train()
    trainer.evaluate()
    assert torch.equal(model.eval()(ids).logits, expected)
    with pytest.raises(ValueError, match="ORPOTrainer has neither labels nor"):
        model.train()(ids)


def test_dropout_is_off_where_trl_turns_it_off(tmp_path):
    with pytest.warns(UserWarning, match="the adapter's dropout is not used"):
        trainer = build_trainer("dpo", tmp_path, loaded=True, dropout=0.4)
    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    losses = {trainer.compute_loss(model, dict(batch)).item() for _ in range(2)}
    assert len(losses) == 1


def test_an_adapter_on_a_quantised_base_stays_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "is_loaded_in_4bit", True, raising=False)
    trainer = build_trainer("sft", tmp_path, loaded=True)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
