"""``python -m examples.real.classify``: an encoder as classifier, with LoReFT and LoRA.

all-MiniLM-L6-v2 (22.7 million parameters) learns the sentiment of movie reviews and the
types of questions. As in the paper's classification tasks, the whole input is the
prompt, LoReFT edits its first tokens in all layers with rank 1, and the classification
head is trained as well; here LoRA and the head alone are beside it. axolotl trains no
such classifiers, so this is transformers' Trainer.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

from axolotl_reft import LoreftConfig
from examples.real.models import minilm
from examples.real.tasks import Conversation, Task, folder_of, load

# What is asked without the instruction, which a classifier does not need.
TEXTS: dict[str, Callable[[str], str]] = {
    "review sentiment": lambda question: question.partition("\n\n")[2],
    "question types": lambda question: question.partition("\n\n")[0],
}
_MOST_TOKENS = 128


@dataclass(frozen=True)
class Method:
    """An adapter, and the learning rates that it may try; as many for each."""

    config: PeftConfig | None
    learning_rates: tuple[float, ...]


METHODS = {
    "head alone": Method(None, (3e-3, 1e-2, 3e-2)),
    "LoReFT f3, rank 1": Method(
        LoreftConfig(task_type="SEQ_CLS", positions="f3", rank=1),
        (1e-3, 4e-3, 1.5e-2),
    ),
    "LoReFT all, identity, rank 8": Method(
        LoreftConfig(
            task_type="SEQ_CLS", positions="all", rank=8, init_weights="identity"
        ),
        (1e-3, 4e-3, 1.5e-2),
    ),
    "LoRA rank 8": Method(
        LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16), (1e-3, 3e-3, 1e-2)
    ),
}


@dataclass(frozen=True)
class Result:
    """One training's.

    Attributes:
        parameters: trained ones, without the head's.
        validation: right answers in %, as ``test``.
        seconds_per_step: of CPU time.
    """

    learning_rate: float
    parameters: int
    validation: float
    test: float
    seconds_per_step: float


def rows_of(
    task: Task, conversations: Sequence[Conversation], tokenizer: Any
) -> list[dict[str, Any]]:
    """Tokenize questions without their instruction, and number their answers."""
    text_of, labels = TEXTS[task.name], labels_of(task)
    return [
        {
            **tokenizer(text_of(question), truncation=True, max_length=_MOST_TOKENS),
            "labels": labels.index(answer),
        }
        for ((question, answer),) in conversations
    ]


def labels_of(task: Task) -> list[str]:
    return sorted({answer for ((_, answer),) in task.train})


def train(
    task: Task, base: str, method: Method, learning_rate: float, options: Any, seed: int
) -> Result:
    """Train a classifier on the samples that a seed chooses, and score it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(labels_of(task))
    )
    head = sum(p.numel() for p in model.classifier.parameters())
    if method.config is None:
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    else:
        model = get_peft_model(model, method.config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    samples = min(len(task.train), options.steps * options.batch)
    chosen = random.Random(seed).sample(task.train, samples)
    data = {
        "train": rows_of(task, chosen, tokenizer),
        "validation": rows_of(task, task.validation, tokenizer),
        "test": rows_of(task, task.test, tokenizer),
    }
    with TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            max_steps=options.steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=50,
            warmup_steps=0.1,  # below 1, of all steps
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            label_names=["labels"],  # the Trainer cannot read them off a PEFT model
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data["train"],
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        # Of this process: others on the machine hardly lengthen them.
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        scores = [_accuracy(trainer, data[part]) for part in ("validation", "test")]
    return Result(
        learning_rate, trained - head, scores[0], scores[1], seconds / options.steps
    )


def compare(task: Task, base: str, method: Method, options: Any) -> list[Result]:
    """Train with each learning rate and the first seed, then with the rate that was
    best in validation and the others; return the latter and the best."""
    tried = [
        train(task, base, method, rate, options, 0) for rate in method.learning_rates
    ]
    best = max(tried, key=lambda result: result.validation)
    return [
        best,
        *(
            train(task, base, method, best.learning_rate, options, seed)
            for seed in range(1, options.seeds)
        ),
    ]


def _accuracy(trainer: Trainer, rows: list[dict[str, Any]]) -> float:
    found = trainer.predict(rows)
    return 100 * float(np.mean(found.predictions.argmax(-1) == found.label_ids))


def _row(task: str, name: str, results: list[Result]) -> str:
    tests = [result.test for result in results]
    cells = [
        task,
        name,
        f"{results[0].parameters:,}",
        f"{results[0].learning_rate:g}",
        f"{mean(tests):.1f} ({', '.join(f'{test:.1f}' for test in tests)})",
        f"{mean(result.seconds_per_step for result in results):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Print a Markdown table, row by row."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.real.classify",
        description="Train all-MiniLM-L6-v2 as a classifier with LoReFT, LoRA and the "
        "head alone. Each method's learning rate is chosen on validation data among as "
        "many.",
    )
    tasks = {folder_of(name): name for name in TEXTS}
    parser.add_argument("--task", choices=tasks, help="default: both")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    base = str(minilm())
    print("| task | trained | parameters | learning rate | right, % | CPU s a step |")
    print("|---|---|---|---|---|---|")
    for name in [tasks[options.task]] if options.task else TEXTS:
        task = load(name)
        for label, method in METHODS.items():
            results = compare(task, base, method, options)
            print(_row(name, label, results), flush=True)


if __name__ == "__main__":
    main()
