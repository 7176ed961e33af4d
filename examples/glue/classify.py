"""GLUE as in the paper: LoReFT on RoBERTa, trained by transformers' Trainer.

axolotl trains no classifiers of this kind, so this is plain Python, with PEFT. Run from
the root of the repository:

    python examples/glue/classify.py                 # CoLA, FacebookAI/roberta-base
    python examples/glue/classify.py --task sst2
    python examples/glue/classify.py --tiny          # generated data, CPU, no downloads

The settings differ by task. Positions on RoBERTa (the paper's tables 9 and 10): f1 for
MNLI, f11 for QNLI and QQP, f3 for the others. Rank is 1 and all layers are edited in
each; learning rate, dropout, warm-up and epochs (20 to 60) differ. The defaults here
are f3, and otherwise those of pyreft's example command for CoLA, a short run of 3
epochs (its examples/loreft/README.md, where positions are f1).

The measure is not the paper's. Its script splits the validation set, picks the best
checkpoint on one part and reports the other; this one evaluates the last step on all.

Trainable parameters of roberta-base: 18,444 = 12 layers × (2 · 1 · 768 + 1), and the
592,130 of the classifier's head (for two classes), which the paper does not count.
Hardware: computed: weights of the base 0.5 GB in float32 (124,647,170 × 4 bytes). Only
`--tiny` was run by us.
"""

import argparse
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from axolotl_reft import LoreftConfig

SEED = 42
# The columns of each task's sentences.
TASKS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The positions are the paper's for CoLA, the others pyreft's example command's."""
    parser = argparse.ArgumentParser(description="LoReFT on GLUE, with RoBERTa")
    parser.add_argument("--task", choices=TASKS, default="cola")
    parser.add_argument("--base", default="FacebookAI/roberta-base")
    parser.add_argument("--positions", default="f3", help="the first token is <s>")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--output", default="outputs/glue")
    parser.add_argument("--tiny", action="store_true", help="a tiny random base")
    return parser.parse_args(arguments)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Letters as words."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *string.ascii_lowercase]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=32,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def tiny_base(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        pad_token_id=1,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return RobertaForSequenceClassification(config)


def tiny_data() -> DatasetDict:
    """Is there an x in the sentence?"""
    rng = random.Random(0)

    def split(count: int) -> Dataset:
        rows = []
        for number in range(count):
            letters = rng.choices("abcdefgh", k=rng.randint(4, 9))
            if number % 2:
                letters[rng.randrange(len(letters))] = "x"
            rows.append({"sentence": " ".join(letters), "label": number % 2})
        return Dataset.from_list(rows)

    return DatasetDict({"train": split(2048), "validation": split(256)})


def load(
    options: argparse.Namespace,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, DatasetDict, tuple[str, ...]]:
    """Tokenizer, base, data, and the columns of its sentences."""
    if options.tiny:
        tokenizer = tiny_tokenizer()
        return tokenizer, tiny_base(tokenizer), tiny_data(), ("sentence",)
    data = load_dataset("nyu-mll/glue", options.task)
    regression = options.task == "stsb"
    labels = 1 if regression else data["train"].features["label"].num_classes
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    base = AutoModelForSequenceClassification.from_pretrained(
        options.base, num_labels=labels
    )
    return tokenizer, base, data, TASKS[options.task]


def correlation(truth: np.ndarray, given: np.ndarray) -> float:
    """Pearson's; between two classes it is Matthews'."""
    if truth.std() == 0 or given.std() == 0:
        return 0.0
    return float(np.corrcoef(truth, given)[0, 1])


def measure(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and correlation with the truth, or for scores the latter alone."""
    truth = np.asarray(prediction.label_ids, dtype=float)
    given = np.asarray(prediction.predictions)
    if given.shape[-1] == 1:
        return {"correlation": correlation(truth, given[:, 0])}
    given = given.argmax(-1).astype(float)
    accuracy = float((given == truth).mean())
    return {"accuracy": accuracy, "correlation": correlation(truth, given)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, save the adapter with its head, and return the validation's figures."""
    options = parse_arguments(arguments)
    set_seed(SEED)  # a new head, and in --tiny the base, starts at random
    tokenizer, base, data, columns = load(options)
    config = LoreftConfig(
        task_type="SEQ_CLS",  # the whole input is the prompt, and the head is trained
        positions=options.positions,
        rank=options.rank,
        dropout=0.05,
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
        sentences = [rows[column] for column in columns]
        return dict(tokenizer(*sentences, truncation=True, max_length=256))

    kept = ("label",)
    unused = [name for name in data["train"].column_names if name not in kept]
    data = data.map(tokenize, batched=True, remove_columns=unused)
    validation = "validation_matched" if options.task == "mnli" else "validation"
    settings = TrainingArguments(
        output_dir=options.output,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        lr_scheduler_type="linear",
        warmup_steps=0.09,  # below 1, of all steps
        weight_decay=0.0,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        label_names=["labels"],  # the Trainer cannot read them off a PEFT model
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=data["train"],
        eval_dataset=data[validation],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=measure,
    )
    trainer.train()
    figures = trainer.evaluate()
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print({name: round(value, 4) for name, value in figures.items()})
    print(f"saved in {Path(options.output)}")
    return figures


if __name__ == "__main__":
    main()
