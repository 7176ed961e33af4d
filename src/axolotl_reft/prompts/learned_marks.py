"""Marks of answers that a chat template announces or ends in a manner of its own, such
as Mistral's answers after ``[/TOOL_RESULTS]``.

Shapes: T tokens of a conversation.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from axolotl_reft.prompts.turn_kinds import Conversation
from axolotl_reft.prompts.turns import Turns

Markers = dict[str, list[Any]]

# Of marks that a kind of turn needs: Mistral's results of several tools need two.
_MOST = 2


def learn_marks(
    markers: Markers,
    plain: Conversation,
    kinds: Mapping[str, Conversation],
    special: Container[int],
) -> tuple[Markers, list[str]]:
    """Add the marks that kinds of turns need; return with them the kinds whose answers
    no marks find.

    A mark begins with a special token, and an end is one: other ids depend on the text
    around them. What is learned leaves the turns of other kinds as they were.
    """
    known, unmarked = [plain], []
    for name, conversation in kinds.items():
        for most in range(_MOST + 1):  # as few as will do
            extended = _extended(markers, conversation, known, special, most)
            if extended is not None:
                markers = extended
                known.append(conversation)
                break
        else:
            unmarked.append(name)
    return markers, unmarked


def _extended(
    markers: Markers,
    conversation: Conversation,
    known: Sequence[Conversation],
    special: Container[int],
    most: int,
) -> Markers | None:
    """Return the markers with up to ``most`` more by which this conversation is told
    right; None if there are none."""
    wrong = _first_wrong(markers, conversation)
    if wrong is None:
        return markers
    for candidate in _candidates(markers, conversation, wrong, special) if most else ():
        if all(
            _first_wrong(candidate, other) is None
            and _ends(candidate, other) == _ends(markers, other)
            for other in known
        ):
            found = _extended(candidate, conversation, known, special, most - 1)
            if found is not None:
                return found
    return None


def _answers(markers: Markers, conversation: Conversation) -> list[bool]:
    ids_1T = torch.tensor([conversation.ids])
    answer_1T, _ = Turns.parse("every", markers).answers(ids_1T)
    return answer_1T[0].tolist()


def _ends(markers: Markers, conversation: Conversation) -> list[int]:
    """Return the places of the last tokens of all answers."""
    answer_T = [*_answers(markers, conversation), False]
    return [at for at, (now, then) in enumerate(pairwise(answer_T)) if now > then]


def _first_wrong(markers: Markers, conversation: Conversation) -> int | None:
    """Return the number of the first message that the marks misjudge."""
    answer_T = _answers(markers, conversation)
    for number, (is_answer, begin, _, end) in enumerate(conversation.messages):
        if any(told != is_answer for told in answer_T[begin:end]):
            return number
    return None


def _candidates(
    markers: Markers, conversation: Conversation, wrong: int, special: Container[int]
) -> Iterator[Markers]:
    """Yield the markers with one more that might set a message right."""
    ids, messages = conversation
    is_answer, begin, _, end = messages[wrong]
    before = max((message.end for message in messages[:wrong]), default=0)
    prompts, ends = markers["generation_prompts"], markers["end_of_turn"]
    marks: list[list[int]] = []
    if is_answer:
        answer_T = _answers(markers, conversation)
        lost = answer_T.index(False, begin)
        if lost > begin and True in answer_T[lost:end]:
            # The answer goes on behind what also ends one.
            marks = [ids[lost - 1 : answer_T.index(True, lost)]]
        elif lost == begin:
            at = reversed(range(before, begin))
            marks = [ids[start:begin] for start in at if ids[start] in special]
    elif before:
        for token in ids[before:begin]:
            if token in special and token not in ends:
                yield markers | {"end_of_turn": sorted([*ends, token])}
    for mark in marks:
        yield markers | {"generation_prompts": [*prompts, mark]}
