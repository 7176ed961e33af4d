"""The marks of a chat template, found by rendering small conversations with it.

No table of templates: what is common to conversations that differ in one message, and
what the generation prompt adds, tell where an answer begins and what ends it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import dropwhile
from typing import Any

import torch

from axolotl_reft.prompts.learned_marks import learn_marks
from axolotl_reft.prompts.turn_kinds import (
    KINDS,
    PLAIN,
    Message,
    Render,
    render_kind,
    shared,
)
from axolotl_reft.prompts.turns import Turns

# Any two of them that the tokenizer tells apart will do.
_WORDS = ("yes", "no", "one", "two", "red", "blue", "a", "b", "c", "d")
_REMEDY = (
    "Use a template with a generation prompt and a special token at the end of "
    "answers, such as chatml or llama3"
)


def turn_markers(
    tokenizer: Any, chat_template: str | None = None, **options: Any
) -> dict[str, list]:
    """Find the token ids by which the turns of a conversation are told apart.

    Args:
        tokenizer: of transformers.
        chat_template: Jinja source; None takes the tokenizer's own.
        options: handed to ``apply_chat_template``, such as ``enable_thinking``.

    Returns:
        For ``LoreftConfig(turn_markers=...)``: ``generation_prompts``, lists of the ids
        after which an answer begins, and ``end_of_turn``, those that end it.

    Raises:
        ValueError: the tokenizer's chat template is missing, or marks no turns.
    """
    return find_markers(tokenizer, chat_template, **options)[0]


def find_markers(
    tokenizer: Any, chat_template: str | None = None, **options: Any
) -> tuple[dict[str, list[Any]], list[str]]:
    """Find ``turn_markers``, and the kinds of turns that the template renders and whose
    answers they do not find."""

    def render(
        messages: Sequence[Message], generate: bool, tools: Sequence[Any] | None = None
    ) -> list[int]:
        try:
            return tokenizer.apply_chat_template(
                list(messages),
                tokenize=True,
                return_dict=False,
                add_generation_prompt=generate,
                chat_template=chat_template,
                **({"tools": tools} if tools else {}),
                **options,
            )
        except Exception as error:  # templates raise errors of their own
            raise _unclear(f"it failed on a plain conversation: {error}") from error

    if chat_template is None and not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, so it marks no turns; pass one, or "
            "leave out turn_markers for prompts of a single turn"
        )
    return _find(render, tokenizer)


def _find(
    render_messages: Render, tokenizer: Any
) -> tuple[dict[str, list[Any]], list[str]]:
    def render(*contents: str, generate: bool = False) -> list[int]:
        roles = ("user", "assistant") * len(contents)
        said = zip(roles, contents, strict=False)
        messages = [{"role": role, "content": content} for role, content in said]
        return render_messages(messages, generate, None)

    x, y = words = _two_words(tokenizer)
    same, varied = render(x, x, x), render(x, y, x)
    content = shared(same, varied)
    prompted = render(x, generate=True)
    # A generation prompt may go on with what past answers do not have, such as the
    # beginning of a thought.
    begin = min(content, shared(prompted, same))
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    marks = same[shared(render(x), prompted) : begin]
    if not marks:
        # What stands at the end of any question, as Mistral's [/INST] does.
        longer = render(y, x, x)
        elsewhere = shared(render(y, generate=True), longer)
        marks = _ending(same[:begin], longer[:elsewhere])
    if not marks:
        raise _unclear("no token stands between a question and its answer")
    after = _ending(same[content:], varied[content:])
    end = next((token for token in after if token in special), None)
    if end is None:
        raise _without_end(tokenizer.decode(after))
    ends = sorted({end, tokenizer.eos_token_id} - {None})
    # The mark needs nothing of what ends the question.
    if marks[0] in ends:
        marks = list(dropwhile(lambda t: t in ends or t not in special, marks)) or marks
    markers = {"generation_prompts": [marks], "end_of_turn": ends}
    # The marks must find both answers of a conversation that goes on.
    ids = render(x, y, y, x, x)
    changed = render(x, x, y, x, x), render(x, y, y, y, x)
    expected = [shared(ids, longer) - (content - begin) for longer in changed]
    answer_T = Turns.parse("every", markers).answers(torch.tensor([ids]))[0][0]
    begins_T = answer_T[1:] > answer_T[:-1]
    if (begins_T.nonzero().flatten() + 1).tolist() != expected:
        if prompted == render(x) and begin < content:
            raise _unclear(
                "add_generation_prompt adds nothing to it, so at inference a prompt "
                f"ends before the {tokenizer.decode(same[begin:content])!r} that "
                "stands before answers",
                "Have the template end with that where add_generation_prompt is true",
            )
        raise _unclear("the same marks do not begin the answers of every turn")
    plain = render_kind(render_messages, PLAIN, words)
    assert plain is not None, "rendered before"
    kinds = {
        name: conversation
        for name, makers in KINDS.items()
        if (conversation := render_kind(render_messages, makers, words))
    }
    return learn_marks(markers, plain, kinds, special)


def _two_words(tokenizer: Any) -> Sequence[str]:
    known: dict[tuple[int, ...], str] = {}
    for word in _WORDS:
        ids = tuple(tokenizer.encode(word, add_special_tokens=False))
        if ids and tokenizer.unk_token_id not in ids:
            known.setdefault(ids, word)
    if len(known) < 2:
        raise _unclear(f"its tokenizer knows no two words of {', '.join(_WORDS)}")
    return list(known.values())[:2]


def _ending(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """Return the ids that two sequences end with alike."""
    return list(a[len(a) - shared(a[::-1], b[::-1]) :])


def _without_end(after: str) -> ValueError:
    """No special token ends an answer; a template may have written one into ``after``,
    the text behind it."""
    mark = re.match(r"\s*(<[^<>\s]+>)", after)
    if mark is None:
        return _unclear("no special token ends an answer")
    return _unclear(
        f"it ends answers with {mark[1]}, which this tokenizer does not have as one "
        "special token",
        f"Add it with special_tokens: {{eos_token: {mark[1]!r}}}, or under tokens:, "
        "and train its embedding with loreft: modules_to_save: [embed_tokens, "
        "lm_head]; or take a base whose tokenizer has it",
    )


def _unclear(reason: str, remedy: str = _REMEDY) -> ValueError:
    return ValueError(
        f"the turns of this chat template cannot be told apart: {reason}. {remedy}"
    )
