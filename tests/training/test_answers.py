"""Trainers that take the labels out of the batch have the prompts of the labels."""

from types import SimpleNamespace

import pytest
import torch
from conftest import build_adapter
from transformers import (
    AutoModelForTokenClassification,
    LlamaConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother

from axolotl_reft.training.answers import answers_in_columns, note_answers


def cross_entropy(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs, labels)
        return (loss, outputs) if return_outputs else loss


LOSSES = {
    "label smoothing": (Trainer, {"label_smoothing_factor": 0.1}, {}),
    "compute_loss_func": (Trainer, {}, {"compute_loss_func": cross_entropy}),
    "compute_loss": (OwnLoss, {}, {}),
}


@pytest.fixture
def make(tmp_path, model, batch):
    def trainer(kind=Trainer, settings=None, **given):
        rows = [{key: rows[n] for key, rows in batch.items()} for n in (0, 1)]
        arguments = TrainingArguments(
            tmp_path, use_cpu=True, report_to=[], **settings or {}
        )
        return kind(model, arguments, eval_dataset=rows, **given)

    return trainer


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_the_models_labels_has_the_same_prompts(
    make, model, batch, name
):
    kind, settings, given = LOSSES[name]
    trainer = make(kind, settings, **given)
    if name == "label smoothing":
        outputs = model(**batch)
        smoother = LabelSmoother(epsilon=0.1)
        expected = smoother(outputs, batch["labels"], shift_labels=True)
    else:
        outputs = model(**batch)
        expected = cross_entropy(outputs, batch["labels"])
    got, own = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert torch.equal(own.logits, outputs.logits)
    assert torch.equal(got, expected)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item())
    # Another forward is none of that batch.
    with pytest.warns(UserWarning, match="a training forward without labels"):
        alone = model.train()(batch["input_ids"][:, :5]).logits
    assert not torch.equal(alone, own.logits[:, :5])


def test_a_lone_batch_may_come_as_embeddings(make, model, batch):
    def compute_loss(model, inputs):
        embed = model.get_input_embeddings()
        return model(inputs_embeds=embed(inputs["input_ids"])).logits

    trainer = SimpleNamespace(model=model, compute_loss=compute_loss)
    note_answers(trainer)
    got = trainer.compute_loss(model, dict(batch))
    assert torch.equal(got, model(**batch).logits)


@pytest.mark.parametrize("text", ["a part", "another"])
def test_text_that_no_labels_belong_to_is_refused(model, batch, text):
    batch |= {"other_input_ids": batch["input_ids"].flip(0)}

    def compute_loss(model, inputs):
        model(inputs["input_ids"])
        return model(
            inputs["other_input_ids"]
            if text == "another"
            else inputs["input_ids"][:, 1:]
        )

    trainer = SimpleNamespace(model=model, compute_loss=compute_loss)
    note_answers(trainer)
    shape = r"\(2, 12\)" if text == "another" else r"\(2, 11\)"
    with pytest.raises(ValueError, match=f"in a batch of shape {shape}"):
        trainer.compute_loss(model, batch)
    # It is left as it was.
    model.eval()(batch["input_ids"])


@pytest.mark.parametrize("kind", [dict, tuple])
def test_a_batch_without_labels_of_tokens_is_left_to_the_model(model, batch, kind):
    """Such as classes of rows, for a custom loss."""
    inputs = {"input_ids": batch["input_ids"], "labels": torch.tensor([0, 1])}
    inputs = inputs if kind is dict else tuple(inputs.values())

    def compute_loss(model, inputs):
        return model(batch["input_ids"]).logits

    trainer = SimpleNamespace(model=model.eval(), compute_loss=compute_loss)
    note_answers(trainer)
    expected = model(batch["input_ids"]).logits
    assert torch.equal(trainer.compute_loss(model, inputs), expected)


def test_labels_of_a_model_that_does_not_generate_are_left_to_it(tmp_path, batch):
    """A class of each token, whose prompt is the whole sample."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=4, num_labels=64,
    )  # fmt: skip
    base = AutoModelForTokenClassification.from_config(config)
    model = build_adapter(base, task_type="TOKEN_CLS")
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, report_to=[], label_smoothing_factor=0.1
    )
    trainer = Trainer(model, arguments)
    _, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert torch.equal(outputs.logits, model(batch["input_ids"]).logits)


def test_answers_that_are_generated_are_those_of_generate(tmp_path, model, batch):
    """Seq2SeqTrainer with a causal model: the prompt is all that generate is given."""
    arguments = Seq2SeqTrainingArguments(
        tmp_path, use_cpu=True, report_to=[], predict_with_generate=True,
        generation_max_length=16,
    )  # fmt: skip
    rows = [{key: rows[n] for key, rows in batch.items()} for n in (0, 1)]
    predicted = Seq2SeqTrainer(model, arguments).predict(rows)
    generated = model.generate(batch["input_ids"], max_length=16)
    assert predicted.predictions[:, :16].tolist() == generated.tolist()
    expected = model(**batch).loss.item()
    assert predicted.metrics["test_loss"] == pytest.approx(expected)


def test_answers_of_columns_hold_for_their_width_alone():
    answers = answers_in_columns(None, torch.ones(4, 7), None, 3)
    assert answers(torch.ones(2, 7)).tolist() == [[False] * 4 + [True] * 3]
    with pytest.raises(ValueError, match=r"batch of shape \(2, 6\)"):
        answers(torch.ones(2, 6))
