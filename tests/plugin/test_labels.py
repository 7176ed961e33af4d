"""Trainers that take the labels out of the batch: the same tokens are edited."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss
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


def test_distillation_has_the_loss_and_the_gradients_of_the_same_prompts(model, batch):
    trainer = AxolotlKDTrainer.__new__(AxolotlKDTrainer)
    trainer.model = model
    trainer._kd_loss_fn = LigerFusedLinearKLTopKLogprobLoss(
        weight_hard_loss=0.3, weight_soft_loss=0.7, beta=0.0, compiled=False
    )
    show_labels(trainer)
    torch.manual_seed(0)
    teachers = torch.randn(2, 12, 4).log_softmax(-1)
    choices = torch.randint(4, 64, (2, 12, 4))
    taught = batch["labels"].roll(-1, 1) != -100  # by each token, of the next
    taught[:, -1] = False
    target = {
        "target_token_ids": choices,
        "target_logprobs": teachers,
        "target_mask": taught[..., None].expand(-1, -1, 4),
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    got = trainer.compute_loss(model, batch | target, num_items_in_batch=0)

    logits = model(**batch).logits
    students = logits.gather(2, choices).log_softmax(-1)
    divergence = (teachers.exp() * (teachers - students)).sum(-1)[taught].sum()
    hard = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    expected = 0.7 * divergence + 0.3 * hard
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, trained), torch.autograd.grad(expected, trained)
    )


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


@pytest.mark.usefixtures("one_thread")
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
