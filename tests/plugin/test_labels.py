"""Trainers that take the labels out of the batch: the same tokens are edited."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from axolotl.integrations.kd.trainer import AxolotlKDTrainer
from axolotl.monkeypatch.loss.eaft import eaft_loss
from axolotl.utils.dict import DictDefault
from conftest import build_adapter, build_model
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from axolotl_reft.plugin.labels import show_labels
from axolotl_reft.plugin.plugin import LoreftPlugin
from axolotl_reft.prompts import PROMPTS


@pytest.fixture
def batch(tokens):
    ids = tokens(2, 12)
    return {"input_ids": ids, "labels": ids.where(torch.arange(12) >= 7, -100)}


@pytest.fixture
def model():
    return build_adapter(build_model(), positions="f2+l3").train()


LOSSES = {
    "label smoothing": (
        {"label_smoothing_factor": 0.1},
        None,
        partial(LabelSmoother(epsilon=0.1), shift_labels=True),
    ),
    "EAFT": ({}, eaft_loss, eaft_loss),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_loss_without_the_models_labels_has_the_same_prompts(
    tmp_path, model, batch, name
):
    settings, compute_loss_func, loss_of = LOSSES[name]
    expected = loss_of(model(**batch), batch["labels"])
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], **settings)
    trainer = Trainer(model, arguments, compute_loss_func=compute_loss_func)
    LoreftPlugin().add_callbacks_post_trainer(
        DictDefault({"adapter": "loreft"}), trainer
    )
    got, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert torch.equal(outputs.logits, model(**batch).logits)
    assert torch.equal(got, expected)
    # Another forward is none of that batch.
    ids = batch["input_ids"][:, :5]
    assert not torch.equal(model(ids).logits, outputs.logits[:, :5])


def test_distillation_sees_the_hidden_states_of_the_same_prompts(model, batch):
    trainer = AxolotlKDTrainer.__new__(AxolotlKDTrainer)
    trainer.model = model
    seen = []
    trainer._kd_loss_fn = lambda weight, hidden, *_, true_labels: seen.append(hidden)
    show_labels(trainer)
    target = {f"target_{key}": None for key in ("token_ids", "logprobs", "mask")}
    trainer.compute_loss(model, batch | target, num_items_in_batch=0)
    expected = model(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(seen[0], expected)


def test_labels_of_other_tokens_than_the_models_are_refused(model, batch):
    def compute_loss(model, inputs):
        return model(inputs["input_ids"][:, 1:])

    trainer = SimpleNamespace(model=model, compute_loss=compute_loss)
    show_labels(trainer)
    with pytest.raises(
        ValueError, match=r"labels of the batch are \(2, 12\), .*\(2, 1"
    ):
        trainer.compute_loss(model, batch)


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_loader_of_a_training_tells_how_many_prompts_there_are(
    tmp_path, model, batch, streamed
):
    rows = [{key: rows[n] for key, rows in batch.items()} for n in (0, 1)] * 2
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, report_to=[], per_device_train_batch_size=4, max_steps=1
    )
    data = Stream(rows) if streamed else rows
    trainer = Trainer(model, arguments, train_dataset=data)
    collate = trainer.data_collator
    LoreftPlugin().add_callbacks_post_trainer(
        DictDefault({"adapter": "loreft"}), trainer
    )
    (got,) = trainer.get_train_dataloader()
    assert got.get(PROMPTS) == (None if streamed else 4)
    # Its own collator still, of which axolotl's callbacks set attributes.
    assert trainer.data_collator is collate
    with torch.no_grad():
        logits = model(**got).logits
        assert torch.equal(logits[:2], model(**batch).logits)
