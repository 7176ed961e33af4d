"""Training an adapter on conversations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.quality.methods import Method
from examples.real.answers import Turn, turns_of
from examples.real.models import smollm2
from examples.real.tasks import Task


@dataclass(frozen=True)
class Training:
    """Settings of a training.

    Attributes:
        seed: of the adapter's first parameters, the samples and their order.
    """

    method: Method
    learning_rate: float
    seed: int
    steps: int
    batch: int


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
        clock = _Clock()
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        start = process_time()
        trainer.train()
        history = trainer.state.log_history
        losses = [log["loss"] for log in history if "loss" in log]
        return Trained(model, process_time() - start, losses, clock.seconds)


class _Clock(TrainerCallback):
    """Measures the wall time of each step."""

    def __init__(self) -> None:
        self.seconds = list[float]()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(perf_counter() - self._start)


def base_of() -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct in bfloat16, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # On a CPU, eager attention is faster than sdpa for short rows in bfloat16.
    base = AutoModelForCausalLM.from_pretrained(
        smollm2(), dtype=torch.bfloat16, attn_implementation="eager"
    )
    return base, AutoTokenizer.from_pretrained(smollm2())
