"""Trainers that take the labels out of the batch: the same tokens are edited."""

from functools import partial

import pytest
import torch
from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss
from axolotl.integrations.kd.trainer import AxolotlKDTrainer
from axolotl.monkeypatch.loss.eaft import eaft_loss
from axolotl.utils.dict import DictDefault
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from axolotl_reft.plugin.labels import complete_batches
from axolotl_reft.plugin.plugin import LoreftPlugin
from axolotl_reft.training.answers import note_answers
from axolotl_reft.training.collators import LabelledLogits
from axolotl_reft.tuner.context import POSITIONS

PROMPT = {"loreft": {"frozen_prompt": "auto"}}
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
        DictDefault({"adapter": "loreft", **PROMPT}), trainer
    )
    got, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert torch.equal(outputs.logits, model(**batch).logits)
    assert torch.equal(got, expected)
    assert torch.equal(trainer.compute_loss(model=model, inputs=dict(batch)), expected)


def test_distillation_has_the_loss_and_the_gradients_of_the_same_prompts(model, batch):
    trainer = AxolotlKDTrainer.__new__(AxolotlKDTrainer)
    trainer.model = model
    trainer._kd_loss_fn = LigerFusedLinearKLTopKLogprobLoss(
        weight_hard_loss=0.3, weight_soft_loss=0.7, beta=0.0, compiled=False
    )
    note_answers(trainer)
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
        DictDefault({"adapter": "loreft", **PROMPT}), trainer
    )
    (got,) = trainer.get_train_dataloader()
    assert (POSITIONS in got) is not streamed
    # Its own collator still, of which axolotl's callbacks set attributes.
    assert trainer.data_collator is collate
    with torch.no_grad():
        logits = model(**got).logits
        assert torch.equal(logits[:2], model(**batch).logits)


KEPT = ["logits_to_keep", "shift_labels"]


class OwnLoss(Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


@pytest.fixture
def loaded(tmp_path, model, tokens):
    """Which keys a batch of the trainer's training and one of its evaluation has."""
    place, ids = torch.arange(24), tokens(8, 24)
    labels = ids.where(place > 19, -100)
    rows = [{"input_ids": i, "labels": n} for i, n in zip(ids, labels, strict=True)]

    def keys(asked=None, trainer=Trainer, data=rows, arguments=None, **settings):
        arguments = TrainingArguments(
            tmp_path, use_cpu=True, report_to=[], max_steps=1, **arguments or {}
        )
        data = {"train_dataset": data, "eval_dataset": data}
        made = trainer(model, arguments, **data | settings)
        collate = made.data_collator
        cfg = DictDefault(
            {
                "adapter": "loreft",
                "loreft_labelled_logits": asked,
                **PROMPT,
            }
        )
        LoreftPlugin().add_callbacks_post_trainer(cfg, made)
        found = made.get_train_dataloader(), made.get_eval_dataloader()
        found += (made.get_eval_dataloader(made.eval_dataset),)
        assert made.data_collator is collate
        trained, *evaluated = ([*next(iter(loader))] for loader in found)
        assert evaluated[0] == evaluated[1]
        return trained, evaluated[0]

    keys.rows = rows
    return keys


def compiled(mode):
    return {"torch_compile": True, "torch_compile_mode": mode}


@pytest.mark.parametrize("asked", [None, True])
@pytest.mark.parametrize("arguments", [{}, compiled("default")])
def test_training_and_evaluation_compute_the_logits_of_labelled_tokens(
    loaded, caplog, asked, arguments
):
    trained, evaluated = loaded(asked, arguments=arguments)
    assert trained == ["input_ids", "labels", *KEPT, POSITIONS]
    assert evaluated == ["input_ids", "labels", *KEPT]
    assert "has no effect" not in caplog.text


def test_metrics_of_ones_own_see_every_token(loaded):
    trained, evaluated = loaded(compute_metrics=lambda prediction: {})
    assert set(KEPT) < set(trained)
    assert evaluated == ["input_ids", "labels"]


def test_a_loader_that_is_kept_is_wrapped_once(model, tmp_path, tokens):
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(4, 12)]
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    kept = trainer.get_eval_dataloader()
    trainer.get_eval_dataloader = lambda: kept
    complete_batches(trainer, None)
    wrapped = trainer.get_eval_dataloader().base_dataloader.collate_fn
    assert isinstance(wrapped, LabelledLogits)
    assert trainer.get_eval_dataloader().base_dataloader.collate_fn is wrapped


def test_streamed_data_is_left_as_it_is(loaded):
    stream = Stream(loaded.rows)
    assert loaded(data=stream) == (["input_ids", "labels"],) * 2
    trained, evaluated = loaded(eval_dataset=stream)
    assert set(KEPT) < set(trained) and evaluated == ["input_ids", "labels"]
    trained, evaluated = loaded(train_dataset=stream)
    assert trained == ["input_ids", "labels"] and set(KEPT) < set(evaluated)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"trainer": OwnLoss}, "OwnLoss computes the loss itself"),
        ({"compute_loss_func": eaft_loss}, "Trainer computes the loss itself"),
        (
            {"arguments": {"label_smoothing_factor": 0.1}},
            "label_smoothing_factor has the trainer compute the loss",
        ),
        (
            {"arguments": compiled("reduce-overhead")},
            "torch_compile_mode: reduce-overhead makes CUDA graphs, each of one size",
        ),
        (
            {"arguments": compiled("max-autotune")},
            "torch_compile_mode: max-autotune makes CUDA graphs",
        ),
        ({"forward": True}, "LlamaForCausalLM's forward is not transformers' own"),
    ],
)
def test_a_loss_of_all_logits_has_them_and_a_wish_for_fewer_is_answered(
    loaded, model, caplog, monkeypatch, settings, reason
):
    if settings.pop("forward", None):

        def forward(self, input_ids, labels):
            raise AssertionError

        monkeypatch.setattr(type(model.get_base_model()), "forward", forward)
    for asked in (None, True):
        trained, evaluated = loaded(asked, **settings)
        assert trained == ["input_ids", "labels", POSITIONS]
        assert evaluated == ["input_ids", "labels"]
        expected = f"loreft_labelled_logits: true has no effect: {reason}"
        assert (expected in caplog.text) is bool(asked)


def test_it_can_be_turned_off(loaded, caplog):
    trained, evaluated = loaded(False)
    assert trained == ["input_ids", "labels", POSITIONS]
    assert evaluated == ["input_ids", "labels"]
    assert "has no effect" not in caplog.text
