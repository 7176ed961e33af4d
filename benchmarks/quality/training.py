"""Training an adapter on conversations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import torch
from transformers import PrinterCallback

from benchmarks.quality.clock import Clock
from benchmarks.quality.methods import Method
from benchmarks.quality.pyreft_trainer import PyreftModel
from examples.real.answers import Turn, greedy, turns_of
from examples.real.models import smollm2
from examples.real.tasks import Conversation, Task


@dataclass(frozen=True)
class Training:
    """Settings of a training.

    Attributes:
        seed: of the adapter's first parameters, the samples and their order.
        pyreft: interpreter of its environment, for methods that it trains.
    """

    method: Method
    learning_rate: float
    seed: int
    steps: int
    batch: int
    pyreft: str | None = None


def row_of(turns: Sequence[Turn]) -> dict[str, list[int]]:
    """Return a conversation's ids, and its labels: of answers only."""
    return {
        "input_ids": [i for prompt, answer in turns for i in prompt + answer],
        "labels": [
            label for prompt, answer in turns for label in [-100] * len(prompt) + answer
        ],
    }


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        cpu_seconds: of this process; others on the machine hardly lengthen them.
        losses: step by step.
        step_seconds: wall time, step by step.
    """

    model: Any
    parameters: int
    cpu_seconds: float
    losses: list[float]
    step_seconds: list[float]


def train(base: Any, tokenizer: Any, task: Task, training: Training) -> Trained:
    """Train an adapter on a base."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from axolotl_reft import LabelledLogits

    samples = min(len(task.train), training.steps * training.batch)
    chosen = random.Random(training.seed).sample(task.train, samples)
    if training.method.by_pyreft:
        return _train_by_pyreft(tokenizer, chosen, training)
    torch.manual_seed(training.seed)
    model = get_peft_model(base, training.method.config(tokenizer))
    # As axolotl trains by default.
    with TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            learning_rate=training.learning_rate,
            lr_scheduler_type="cosine",
            max_steps=training.steps,
            per_device_train_batch_size=training.batch,
            seed=training.seed,
            train_sampling_strategy="group_by_length",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
        )
        collator = DataCollatorForSeq2Seq(tokenizer)
        if not training.method.is_lora:
            collator = LabelledLogits.of(model, collator)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=[row_of(turns_of(tokenizer, c)) for c in chosen],
            data_collator=collator,
        )
        clock = Clock()
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        start = process_time()
        trainer.train()
        history = trainer.state.log_history
        losses = [log["loss"] for log in history if "loss" in log]
        seconds = process_time() - start
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Trained(model, parameters, seconds, losses, clock.seconds)


def _train_by_pyreft(
    tokenizer: Any, conversations: Sequence[Conversation], training: Training
) -> Trained:
    assert training.pyreft is not None
    rows = list[Turn]()
    for conversation in conversations:
        (turn,) = turns_of(tokenizer, conversation)
        rows.append(turn)
    model = PyreftModel(training.pyreft)
    found = model.train(
        smollm2(),
        rows,
        learning_rate=training.learning_rate,
        seed=training.seed,
        steps=training.steps,
        batch=training.batch,
        **training.method.settings,
    )
    return Trained(model, **found)


def base_of() -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct in bfloat16, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # On a CPU, eager attention is faster than sdpa for short rows in bfloat16.
    base = AutoModelForCausalLM.from_pretrained(
        smollm2(), dtype=torch.bfloat16, attn_implementation="eager"
    )
    return base, AutoTokenizer.from_pretrained(smollm2())


def generate(model: Any, tokenizer: Any, prompts: list[list[int]], most: int) -> Any:
    """Return the ids that greedy decoding adds to each prompt."""
    if isinstance(model, PyreftModel):
        return model.generate(prompts, most)
    return greedy(model, tokenizer, prompts, most)
