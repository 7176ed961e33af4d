"""The classifier of examples/real/, on a tiny encoder."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from examples.real import classify
from examples.real.classify import METHODS, Method, Result
from examples.real.tasks import Task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film"]
REVIEWS = [
    [("Is it?\n\ngood film", "positive")],
    [("Is it?\n\nbad film", "negative")],
]
TASK = Task("review sentiment", REVIEWS * 20, REVIEWS, REVIEWS)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    )


@pytest.fixture(scope="module")
def encoder(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_classifier_reads_the_review_without_the_instruction(tokenizer):
    first, second = classify.rows_of(TASK, REVIEWS, tokenizer)
    assert tokenizer.decode(first["input_ids"]) == "[CLS] good film [SEP]"
    assert (first["labels"], second["labels"]) == (1, 0)


def test_a_table_has_each_methods_parameters_without_the_heads(
    encoder, monkeypatch, capsys
):
    monkeypatch.setattr(classify, "minilm", lambda: encoder)
    monkeypatch.setattr(classify, "load", lambda name: TASK)
    once = {name: Method(method.config, (0.01,)) for name, method in METHODS.items()}
    monkeypatch.setattr(classify, "METHODS", once)
    given = ["--task", "review-sentiment", "--steps", "2", "--batch", "4", "--seeds=2"]
    classify.main(given)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| review sentiment")
    ]
    assert [row[1:4] for row in rows] == [
        ["head alone", "0", "0.01"],
        ["LoReFT f3, rank 1", f"{2 * (2 * 16 + 1)}", "0.01"],
        ["LoReFT all, identity, rank 8", f"{2 * (2 * 8 * 16 + 8)}", "0.01"],
        # Queries and values, in and out.
        ["LoRA rank 8", f"{2 * 2 * 2 * 8 * 16:,}", "0.01"],
    ]
    assert all(row[4].count(",") == 1 for row in rows)


def test_the_rate_that_validation_chose_is_kept_for_the_other_seeds(monkeypatch):
    validation = {1e-3: 60.0, 1e-2: 80.0, 1e-1: 70.0}
    tried = []

    def train(task, base, method, rate, options, seed):
        tried.append((rate, seed))
        return Result(rate, 0, validation[rate], 10.0 + seed, 0.1)

    monkeypatch.setattr(classify, "train", train)
    options = classify.argparse.Namespace(seeds=3)
    results = classify.compare(TASK, "", Method(None, tuple(validation)), options)
    assert tried == [(1e-3, 0), (1e-2, 0), (1e-1, 0), (1e-2, 1), (1e-2, 2)]
    assert [(r.learning_rate, r.test) for r in results] == [
        (1e-2, 10),
        (1e-2, 11),
        (1e-2, 12),
    ]
