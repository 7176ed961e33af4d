"""Training steps that are timed: functions that take one turn and say its cost."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.base import Batch, Setting, clock, packed, padded, rectangle, share
from benchmarks.contestants import (
    CONTESTANTS,
    Contestant,
    autocast,
    frozen_prompt,
    ours,
)


def make_optimizer(contestant: Contestant) -> Any:
    """axolotl's and transformers' default."""
    if not contestant.trained:
        return None
    return torch.optim.AdamW(contestant.trained, lr=1e-4, fused=True)


def train(contestant: Contestant, optimizer: Any, batches: list[Batch]) -> None:
    for batch in batches:
        contestant.loss(batch).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()


def training(
    name: str,
    base: nn.Module,
    setting: Setting,
    batches: list[Batch],
    steps: int = 1,
    compiled: bool = False,
) -> Callable[[], float]:
    contestant = CONTESTANTS[name](share(base), setting)
    if compiled:
        contestant.model.compile(fullgraph=True)
    optimizer, now = make_optimizer(contestant), clock(setting)
    batches = [contestant.collate(batch) for batch in batches]

    def turn() -> float:
        start = now()
        train(contestant, optimizer, batches * steps)
        return (now() - start) / steps

    return turn


def training_step(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """Seconds of forward, backward and the optimizer's step."""
    return training(name, base, setting, [rectangle(setting)])


def steps_in_a_row(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """The same, of four steps between which nobody waits for the device, as a trainer
    does not between two logs."""
    return training(name, base, setting, [rectangle(setting)], steps=4)


def compiled_step(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """Seconds of a training step of the model as one graph of torch.compile's."""
    return training(name, base, setting, [rectangle(setting)], compiled=True)


def ragged(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """Seconds an epoch of ragged samples takes, pyreft's padded and others packed."""
    batches = padded(setting) if name == "pyreft" else packed(setting)
    return training(name, base, setting, batches)


def logged_step(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """Seconds of a training step, plain or with the edits logged in each."""
    contestant = ours(share(base), setting)
    batch = contestant.collate(rectangle(setting))
    optimizer, now = make_optimizer(contestant), clock(setting)
    trainer = SimpleNamespace(model=contestant.model, log=lambda logs: None)
    told = None
    if name == "logged":
        from axolotl_reft.training.edit_log import EditLog

        told = EditLog(trainer)
    # What transformers' Trainer says of a step that is logged.
    step: Any = (
        SimpleNamespace(
            torch_compile=False, logging_first_step=True, logging_strategy="steps"
        ),
        SimpleNamespace(global_step=0),
        None,
    )

    def turn() -> float:
        start = now()
        if told:
            told.on_step_begin(*step)
        contestant.loss(batch).backward()
        if told:
            told.on_pre_optimizer_step(*step)
        optimizer.step()
        optimizer.zero_grad()
        trainer.log({"loss": 0.0})
        return now() - start

    return turn


def shared_prompt_step(
    name: str, base: nn.Module, setting: Setting
) -> Callable[[], float]:
    """Seconds of a training step whose samples are new in each turn, but for the tokens
    that all prompts begin with."""
    contestant = CONTESTANTS[name](share(base), setting)
    optimizer, now = make_optimizer(contestant), clock(setting)
    seeds = count()

    def turn() -> float:
        batch = contestant.collate(rectangle(setting, next(seeds)))
        start = now()
        train(contestant, optimizer, [batch])
        return now() - start

    return turn


def preference_step(
    name: str, base: nn.Module, setting: Setting
) -> Callable[[], float]:
    """Seconds of a training step with the loss of TRL's DPOTrainer: ``batch`` pairs of
    a chosen and a rejected answer to one prompt, all logits, and a reference that is
    the base."""
    contestant = ours(share(base), setting)
    model, optimizer = contestant.model, make_optimizer(contestant)
    trainer, now = _preference_trainer(model, setting), clock(setting)
    begin = frozen_prompt(name, model)  # the trainer has decided on it by itself
    ids = rectangle(setting).inputs["input_ids"].repeat(2, 1)
    answers = rectangle(setting, seed=2).inputs["input_ids"]
    ids[setting.batch :, setting.prompt :] = answers[:, setting.prompt :]
    mask = torch.ones_like(ids)
    completions = mask.clone()
    completions[:, : setting.prompt] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": completions}

    def turn() -> float:
        start = now()
        begin()
        with autocast(setting):
            loss = trainer.compute_loss(model, dict(inputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return now() - start

    return turn


def _preference_trainer(model: nn.Module, setting: Setting) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = models.WordLevel({"<pad>": 0, "a": 1, "</s>": 2}, unk_token="a")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="</s>"
    )
    with TemporaryDirectory() as directory:
        return DPOTrainer(
            model,
            args=DPOConfig(
                output_dir=directory,
                report_to=[],
                bf16=False,
                use_cpu=setting.device == "cpu",
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": "a", "chosen": "a", "rejected": "a"}]
            ),
            processing_class=tokenizer,
        )
