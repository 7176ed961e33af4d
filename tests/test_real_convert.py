"""A GGUF file's tokenizer (examples/real/convert.py), without the package gguf."""

import importlib
import sys
from types import SimpleNamespace

import pytest

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
# Higher scores are merged first, whatever comes first in the vocabulary.
SCORES = {"ab": -2.0, "bc": -1.0, "▁a": -3.0, "▁": -8.0, "a": -5.0, "b": -6.0}
WORDS = [*SCORES, "c", "user", "model"]


@pytest.fixture
def convert(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(GGUFReader=None))
    monkeypatch.delitem(sys.modules, "examples.real.convert", raising=False)
    yield importlib.import_module("examples.real.convert")
    sys.modules.pop("examples.real.convert", None)


def said(name: str):
    tokens = [*SPECIAL, "\n", "  ", *WORDS, "<0xC3>", "<0xA9>"]
    ids = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0}
    return {
        "tokens": tokens,
        "scores": [SCORES.get(token, -99.0) for token in tokens],
        "token_type": [3] * len(SPECIAL) + [4, 4] + [1] * len(WORDS) + [6, 6],
        **{f"{name}_token_id": number for name, number in ids.items()},
    }[name]


def tokens_of(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_gemmas_words_are_joined_in_the_order_of_their_scores(convert):
    tokenizer = convert._gemma(said)
    assert tokens_of(tokenizer, "abc") == ["<bos>", "a", "bc"]
    assert tokens_of(tokenizer, "ab ab") == ["<bos>", "ab", "▁", "ab"]


def test_gemmas_bytes_line_breaks_and_spaces_are_tokens(convert):
    tokenizer = convert._gemma(said)
    ids = tokenizer("a\n  bé")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[1:] == [
        "a",
        "\n",
        "▁▁",
        "b",
        "<0xC3>",
        "<0xA9>",
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a\n  bé"


def test_a_turn_of_gemmas_chat_ends_with_its_end_of_text(convert):
    tokenizer = convert._gemma(said)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<end_of_turn>", "<pad>")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<bos><start_of_turn>user\na<end_of_turn>\n"
        "<start_of_turn>model\nbc<end_of_turn>\n"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Whole tokens, and one <bos>.
    assert [ids.count(number) for number in (2, 4, 5)] == [1, 2, 2]
