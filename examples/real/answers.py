"""Asking a model a task's questions, and telling which answers are right.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from examples.real.tasks import Conversation, Task

# Ids of a turn's prompt, from the end of the last answer on, and of its answer.
Turn = tuple[list[int], list[int]]
# The ids behind prompts, of a model and a tokenizer, so many at most.
Generate = Callable[[Any, Any, list[list[int]], int], Any]
_FEWEST_TOKENS = 16


@dataclass(frozen=True)
class Answer:
    """What a model answered to a question, in one of a conversation's turns."""

    question: str
    generated: str
    expected: str
    right: bool


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
        # The template has written the special tokens.
        texts = [prompt.removeprefix(before), answered]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        turns.append((ids[0], ids[1]))
        messages.append({"role": "assistant", "content": answer})
        before = prompt + answered
    return turns


def accuracy(
    model: Any,
    tokenizer: Any,
    task: Task,
    conversations: Sequence[Conversation],
    batch: int = 50,
    generate: Generate | None = None,
) -> float:
    """Return the share of right answers in %, by greedy decoding."""
    given = answers(model, tokenizer, task, conversations, batch, generate)
    return 100 * sum(answer.right for answer in given) / len(given)


@contextmanager
def head_by_copy(model: Any) -> Iterator[None]:
    """Spare ``generate`` a detour on a CPU: with a frozen head, matmul expands its
    weights to every row of a batch, which takes several times as long."""
    weight = model.get_output_embeddings().weight
    was_trained = weight.requires_grad
    weight.requires_grad_(True)
    yield
    weight.requires_grad_(was_trained)


@torch.no_grad()
def greedy(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    most: int,
    fewest: int | None = None,
) -> Any:
    """Return the ids that greedy decoding adds to each prompt."""
    model.eval()
    inputs = tokenizer.pad(
        {"input_ids": prompts}, padding_side="left", return_tensors="pt"
    ).to(model.device)
    with head_by_copy(model):
        ids_BT = model.generate(
            **inputs, do_sample=False, max_new_tokens=most, min_new_tokens=fewest
        )
    return ids_BT[:, inputs["input_ids"].shape[1] :]


def answers(
    model: Any,
    tokenizer: Any,
    task: Task,
    conversations: Sequence[Conversation],
    batch: int = 50,
    generate: Generate | None = None,
) -> list[Answer]:
    """Decode the answer of every turn greedily.

    Each turn is asked after the right answers to those before.

    Args:
        generate: of what ``greedy`` cannot ask.
    """
    asked = list[tuple[list[int], str, str]]()
    lengths = list[int]()
    for conversation in conversations:
        before = list[int]()
        turns = turns_of(tokenizer, conversation)
        for (question, expected), (prompt, answer) in zip(
            conversation, turns, strict=True
        ):
            asked.append((before + prompt, question, expected))
            before = before + prompt + answer
            lengths.append(len(answer))
    # Of about equal lengths in a batch.
    order = sorted(range(len(asked)), key=lambda n: len(asked[n][0]))
    generated = [""] * len(asked)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        # Enough for a model that was not trained to come to the point.
        most = max(_FEWEST_TOKENS, *(lengths[n] for n in chosen))
        prompts = [asked[n][0] for n in chosen]
        ids_BT = (generate or greedy)(model, tokenizer, prompts, most)
        texts = tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        for n, text in zip(chosen, texts, strict=True):
            generated[n] = text
    return [
        Answer(question, text, expected, task.is_right(text, expected))
        for (_, question, expected), text in zip(asked, generated, strict=True)
    ]
