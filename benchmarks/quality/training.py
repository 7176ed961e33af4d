"""Training an adapter on conversations, and asking it the held-out ones.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.quality.methods import Method
from examples.real.models import smollm2
from examples.real.tasks import Conversation, Task

# Ids of a turn's prompt, from the end of the last answer on, and of its answer.
Turn = tuple[list[int], list[int]]
_FEWEST_TOKENS = 16


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


def turns_of(tokenizer: Any, conversation: Conversation) -> list[Turn]:
    """Tokenize a conversation in the chat template, the end of each turn in its
    answer."""
    messages = list[dict[str, str]]()
    turns, before = list[Turn](), ""
    for question, answer in conversation:
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert prompt.startswith(before)
        answered = answer + tokenizer.eos_token
        ids = tokenizer([prompt.removeprefix(before), answered])["input_ids"]
        turns.append((ids[0], ids[1]))
        messages.append({"role": "assistant", "content": answer})
        before = prompt + answered
    return turns


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


@contextmanager
def head_by_copy(model: Any) -> Iterator[None]:
    """Spare ``generate`` a detour on a CPU: with a frozen head, matmul expands its
    weights to every row of a batch, which takes several times as long."""
    weight = model.get_output_embeddings().weight
    was_trained = weight.requires_grad
    weight.requires_grad_(True)
    yield
    weight.requires_grad_(was_trained)


def base_of() -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct in bfloat16, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # On a CPU, eager attention is faster than sdpa for short rows in bfloat16.
    base = AutoModelForCausalLM.from_pretrained(
        smollm2(), dtype=torch.bfloat16, attn_implementation="eager"
    )
    return base, AutoTokenizer.from_pretrained(smollm2())


@torch.no_grad()
def accuracy(
    model: Any,
    tokenizer: Any,
    task: Task,
    conversations: Sequence[Conversation],
    batch: int = 50,
) -> float:
    """Return the share of right answers in %, by greedy decoding.

    Each turn is asked after the right answers to those before.
    """
    questions = list[tuple[list[int], list[int]]]()
    for conversation in conversations:
        before = list[int]()
        for prompt, answer in turns_of(tokenizer, conversation):
            questions.append((before + prompt, answer))
            before = before + prompt + answer
    questions.sort(key=lambda question: len(question[0]))
    right = 0
    model.eval()
    for start in range(0, len(questions), batch):
        asked = questions[start : start + batch]
        # Enough for a model that was not trained to come to the point.
        most = max(_FEWEST_TOKENS, *(len(answer) for _, answer in asked))
        inputs = tokenizer.pad(
            {"input_ids": [prompt for prompt, _ in asked]},
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        with head_by_copy(model):
            ids_BT = model.generate(**inputs, do_sample=False, max_new_tokens=most)
        ids_BT = ids_BT[:, inputs["input_ids"].shape[1] :]
        generated = tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        answers = tokenizer.batch_decode(
            [answer for _, answer in asked], skip_special_tokens=True
        )
        right += sum(map(task.is_right, generated, answers))
    return 100 * right / len(questions)
