"""Prompts and rewards for GRPO on grade-school problems, found by name by axolotl."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def prompts(cfg: Any, **_: Any) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
    """Return how a row becomes a prompt, and the columns that are then left out."""

    def make(row: dict[str, str], tokenizer: Any = None) -> dict[str, Any]:
        question = row["question"] + " End with the answer as a number."
        number = row["answer"].split("####")[-1].replace(",", "").strip()
        return {"prompt": [{"role": "user", "content": question}], "number": number}

    return make, {"remove_columns": ["question", "answer"]}


def correct(
    completions: list[list[dict[str, str]]], number: list[str], **_: Any
) -> list[float]:
    """Reward 1 where the last number of an answer is the right one, else 0."""
    answers = [completion[0]["content"].replace(",", "") for completion in completions]
    found = [re.findall(r"-?\d+(?:\.\d+)?", answer)[-1:] for answer in answers]
    return [float(f == [right]) for f, right in zip(found, number, strict=True)]
