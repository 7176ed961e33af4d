"""Small conversations with every kind of turn, to look at a chat template with.

A template may announce an answer that follows a tool's result, or that begins with a
thought, otherwise than one that follows a question.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

Message = dict[str, Any]
# Renders messages, with a generation prompt or without, and tools.
Render = Callable[[Sequence[Message], bool, Sequence[Any] | None], list[int]]
# Makes a message from its text and its place in the conversation.
MakeMessage = Callable[[str, int], Message]

_NAME = "look_up"
_FUNCTION = {
    "name": _NAME,
    "description": "Look it up.",
    "parameters": {
        "type": "object",
        "properties": {
            "key": {"type": "string", "description": "what"},
            "more": {"type": "string", "description": "what else"},
        },
        "required": ["key", "more"],
    },
}
_TOOLS = [{"type": "function", "function": _FUNCTION}]


def _says(role: str) -> MakeMessage:
    return lambda text, at: {"role": role, "content": text}


def _thinks(text: str, at: int) -> Message:
    return {"role": "assistant", "content": text} | _thought(text)


def _thought(text: str) -> Message:
    return {"reasoning_content": text, "thinking": text}  # templates read one of them


def _calls(count: int, content: bool = False, thought: bool = False) -> MakeMessage:
    def make(text: str, at: int) -> Message:
        calls = [
            {
                "type": "function",
                "id": _call_id(at + number),
                "function": {
                    "name": _NAME,
                    "arguments": {"key": text, "more": text},
                },
            }
            for number in range(1, count + 1)
        ]
        message = {"role": "assistant", "content": text if content else ""}
        return message | (_thought(text) if thought else {}) | {"tool_calls": calls}

    return make


def _result(text: str, at: int) -> Message:
    answers = {"name": _NAME, "tool_call_id": _call_id(at)}
    return {"role": "tool", "content": text} | answers


def _call_id(at: int) -> str:
    return f"call{at:05}"  # of nine letters, as Mistral's templates demand


_system, _user, _assistant = map(_says, ("system", "user", "assistant"))
_call = _calls(1)

PLAIN = (_user, _assistant, _user, _assistant, _user, _assistant)
KINDS: Mapping[str, Sequence[MakeMessage]] = {
    "a system message": (_system, _user, _assistant, _user, _assistant),
    "several tools' results": (_user, _calls(2), _result, _result, _assistant),
    "a tool's result": (_user, _call, _result, _assistant),
    "several calls in a row": (_user, _call, _result, _call, _result, _assistant),
    "a question after a tool's result": (
        *(_user, _call, _result, _assistant, _user, _assistant),
    ),
    "a call beside text": (_user, _calls(1, content=True), _result, _assistant),
    "a thought": (_user, _thinks, _user, _thinks),
    "a thought before a call": (_user, _calls(1, thought=True), _result, _thinks),
    "several questions in a row": (_user, _user, _assistant, _user, _assistant),
    "several answers in a row": (_user, _assistant, _assistant, _user, _assistant),
    "an answer that begins the conversation": (_assistant, _user, _assistant),
}


class Said(NamedTuple):
    """The tokens of a message in a rendered conversation.

    Attributes:
        begin: an answer's first token, where the generation prompt ends.
        start: the first token of the text.
        end: one past its last.
    """

    is_answer: bool
    begin: int
    start: int
    end: int


class Conversation(NamedTuple):
    """A rendered conversation, and its messages in the order of their tokens."""

    ids: list[int]
    messages: list[Said]


def render_kind(
    render: Render, makers: Sequence[MakeMessage], words: Sequence[str]
) -> Conversation | None:
    """Render a conversation; None where the template refuses it, or leaves a message
    out.

    Args:
        words: two that the tokenizer tells apart.
    """
    # Some templates take the arguments of a call as text.
    for prepare in (dict, _with_arguments_as_text):
        said, *varied = (
            [
                prepare(make(_text(words, at, at == changed), at))
                for at, make in enumerate(makers)
            ]
            for changed in (None, *range(len(makers)))
        )
        tools = _TOOLS if any("tool_calls" in message for message in said) else None
        try:
            ids, *others = (render(each, False, tools) for each in (said, *varied))
        except ValueError:
            continue
        return None if ids in others else _locate(render, said, tools, ids, others)
    return None


def _locate(
    render: Render,
    said: Sequence[Message],
    tools: Sequence[Any] | None,
    ids: list[int],
    others: Sequence[list[int]],
) -> Conversation:
    """Find each message where the ids differ from those of another one in its place."""
    found: list[Said] = []
    for number, other in enumerate(others):
        start = begin = shared(ids, other)
        end = max(len(ids) - shared(ids[::-1], other[::-1]), start + 1)
        before = max((m.end for m in found if m.end <= start), default=0)
        is_answer = said[number]["role"] == "assistant"
        if is_answer and before:
            try:
                prompted = shared(render(said[:number], True, tools), ids)
            except ValueError:  # a template may demand what comes later
                prompted = start
            # Some templates render what came before differently then.
            begin = min(start, prompted) if prompted >= before else start
        found.append(Said(is_answer, begin, start, end))
    return Conversation(ids, sorted(found, key=lambda message: message.start))


def _text(words: Sequence[str], number: int, changed: bool) -> str:
    """Return a text that no other message has, since some templates compare them."""
    bits = (0, number >> 2 & 1, number >> 1 & 1, number & 1)
    return " ".join(words[bit ^ changed] for bit in bits)


def _with_arguments_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = copy.deepcopy(message["tool_calls"])
    for call in calls:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return message | {"tool_calls": calls}


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the ids that two sequences begin with alike."""
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
