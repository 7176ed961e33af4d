"""The toy language of this demo: its skills, its prompts, its tokenizer.

A prompt is some letters, an instruction word and an equals sign; the answer follows:
`k b t q reverse = q t b k`. The base model learns four instruction words. A fifth one,
`mirror`, is in the tokenizer, but the base never sees it: LoReFT is to teach it. It
means what `reverse` means, so this is a new word for a skill that the base has.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase as LETTERS
from typing import TypedDict

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

HERE = Path(__file__).parent
BASE_DIR = HERE / "base"
DATA_DIR = HERE / "data"
OUT_DIR = HERE / "out"
SERVED_DIR = HERE / "served" / "base"

BASE_WORDS = ("copy", "reverse", "sort", "next")
NEW_WORD = "mirror"
NEW_MEANING = "reverse"
MIN_LETTERS, MAX_LETTERS = 4, 6


class Example(TypedDict):
    """One line of a data file."""

    instruction: str
    output: str


def solve(word: str, letters: list[str]) -> list[str]:
    """What an instruction word makes of the letters."""
    if word == NEW_WORD:
        word = NEW_MEANING
    if word == "reverse":
        return letters[::-1]
    if word == "sort":
        return sorted(letters)
    if word == "next":
        return [LETTERS[(LETTERS.index(x) + 1) % len(LETTERS)] for x in letters]
    return letters


def make_example(word: str, letters: list[str]) -> Example:
    """Write a prompt and its answer as text."""
    return {
        "instruction": f"{' '.join(letters)} {word} =",
        "output": " ".join(solve(word, letters)),
    }


def draw_letters(rng: random.Random, exclude: set[str]) -> Iterator[list[str]]:
    """Endless letter strings without repeats, none of them in `exclude`.

    No letter comes twice, so that a repetition penalty, which `axolotl inference`
    applies, does not speak against a right answer.
    """
    while True:
        letters = rng.sample(LETTERS, rng.randint(MIN_LETTERS, MAX_LETTERS))
        if "".join(letters) not in exclude:
            yield letters


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter and word; BOS in front, EOS left to the trainer."""
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*specials, "=", *LETTERS, *BASE_WORDS, NEW_WORD]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A",
        pair="<s> $A $B",
        special_tokens=[("<s>", vocabulary["<s>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        # Without token types, which a Llama does not take.
        model_input_names=["input_ids", "attention_mask"],
    )


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    batch_size: int = 250,
) -> list[str]:
    """Answer the prompts greedily, in left-padded batches."""
    model.eval()
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            prompts[start : start + batch_size],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        tokens = model.generate(
            **batch, max_new_tokens=MAX_LETTERS + 2, do_sample=False
        )
        replies = tokens[:, batch["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(replies, skip_special_tokens=True)
    return answers


def exact_match(answers: list[str], examples: list[Example]) -> float:
    """Fraction of the answers that are right from first to last letter."""
    pairs = zip(answers, examples, strict=True)
    return sum(given == example["output"] for given, example in pairs) / len(examples)
