"""Each chat template of axolotl and TRL: its marks find the answers, or it says so."""

import json
import re

import pytest
import torch
from chat_templates import build_tokenizer_for, template_files

from axolotl_reft.prompts.batch import labelled_spans
from axolotl_reft.prompts.templates import find_markers, turn_markers
from axolotl_reft.prompts.turns import Turns

FILES = template_files()
# No special token ends an answer, or contents are no strings.
REFUSED = {
    "axolotl/llava", "trl/idefics3", "trl/idefics3_training", "trl/llava_next",
    "trl/llava_next_training",
}  # fmt: skip
IN_A_ROW, BEGINS = "several answers in a row", "an answer that begins the conversation"
# What a template announces by nothing: answers behind an end of turn, or at the start.
UNMARKED = {
    "axolotl/gemma4": ["a call beside text", IN_A_ROW],
    "axolotl/gemma4_unified": ["a call beside text", IN_A_ROW],
    "axolotl/mistral_v7_tekken": [IN_A_ROW, BEGINS],
    "axolotl/phi_3": [IN_A_ROW, BEGINS],
    "trl/deepseekv3": ["several calls in a row"],
    "trl/deepseekv3_training": ["several calls in a row"],
}

FUNCTION = {
    "name": "weather",
    "description": "Tell the weather.",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]


def message(role, text, calls=(), thought=None, answers=None):
    """A message; calls are (id, argument), and ``answers`` is the id of one."""
    said = {"role": role, "content": text}
    if calls:
        said["tool_calls"] = [
            {
                "type": "function",
                "id": number,
                "function": {"name": "weather", "arguments": {"town": town}},
            }
            for number, town in calls
        ]
    if thought:
        said |= {"reasoning_content": thought, "thinking": thought}
    if answers:
        said |= {"name": "weather", "tool_call_id": answers}
    return said


THOUGHTS = {"Amuse", "Aponder"}
WORDS = THOUGHTS | {
    "Qsystem", "Qask", "Qplease", "Qmore", "Qsunny", "Qrainy",
    "Asay", "Atwice", "Aparis", "Arome", "Alook", "Aalso", "Ahello",
}  # fmt: skip
ONE, TWO = "callone01", "calltwo02"
# By the names of the kinds. Texts of answers begin with A, of others with Q.
CONVERSATIONS = {
    "a system message": [
        message("system", "Qsystem"), message("user", "Qask"),
        message("assistant", "Asay"), message("user", "Qmore"),
        message("assistant", "Atwice"),
    ],
    "a tool's result": [
        message("user", "Qask"), message("assistant", "", [(ONE, "Aparis")]),
        message("tool", "Qsunny", answers=ONE), message("assistant", "Asay"),
    ],
    "several tools' results": [
        message("user", "Qask"),
        message("assistant", "", [(ONE, "Aparis"), (TWO, "Arome")]),
        message("tool", "Qsunny", answers=ONE), message("tool", "Qrainy", answers=TWO),
        message("assistant", "Asay"),
    ],
    "several calls in a row": [
        message("user", "Qask"), message("assistant", "", [(ONE, "Aparis")]),
        message("tool", "Qsunny", answers=ONE),
        message("assistant", "", [(TWO, "Arome")]),
        message("tool", "Qrainy", answers=TWO), message("assistant", "Asay"),
    ],
    "a question after a tool's result": [
        message("user", "Qask"), message("assistant", "", [(ONE, "Aparis")]),
        message("tool", "Qsunny", answers=ONE), message("assistant", "Asay"),
        message("user", "Qmore"), message("assistant", "Atwice"),
    ],
    "a call beside text": [
        message("user", "Qask"), message("assistant", "Alook", [(ONE, "Aparis")]),
        message("tool", "Qsunny", answers=ONE), message("assistant", "Asay"),
    ],
    "a thought": [
        message("user", "Qask"), message("assistant", "Asay", thought="Amuse"),
        message("user", "Qmore"), message("assistant", "Atwice", thought="Aponder"),
    ],
    "a thought before a call": [
        message("user", "Qask"),
        message("assistant", "", [(ONE, "Aparis")], thought="Amuse"),
        message("tool", "Qsunny", answers=ONE),
        message("assistant", "Asay", thought="Aponder"),
    ],
    "several questions in a row": [
        message("user", "Qask"), message("user", "Qplease"),
        message("assistant", "Asay"), message("user", "Qmore"),
        message("assistant", "Atwice"),
    ],
    IN_A_ROW: [
        message("user", "Qask"), message("assistant", "Asay"),
        message("assistant", "Aalso"), message("user", "Qmore"),
        message("assistant", "Atwice"),
    ],
    BEGINS: [
        message("assistant", "Ahello"), message("user", "Qask"),
        message("assistant", "Asay"),
    ],
}  # fmt: skip


def with_text_arguments(conversation):
    """Some templates take a call's arguments as text."""
    copied = json.loads(json.dumps(conversation))
    for said in copied:
        for call in said.get("tool_calls", ()):
            function = call["function"]
            function["arguments"] = json.dumps(function["arguments"])
    return copied


def render(tokenizer, conversation):
    """Ids of a conversation; None where the template refuses it."""
    tools = TOOLS if any("tool_calls" in said for said in conversation) else None
    for said in (conversation, with_text_arguments(conversation)):
        try:
            return tokenizer.apply_chat_template(said, tools=tools, return_dict=False)
        except Exception:  # noqa: BLE001, S112, of templates
            continue
    return None


def texts_of(conversation):
    """The texts that a template should write; of a thought only the last."""
    return {
        word for word in WORDS if f'"{word}"' in json.dumps(conversation)
    } - THOUGHTS


def words_in(tokenizer, ids):
    return set(re.findall("[AQ][a-z]+", tokenizer.decode(ids)))


def columns_of(tokenizer, ids, first):
    """Columns of the texts that begin with this letter; a byte is a token."""
    letters = tokenizer.convert_ids_to_tokens(ids)
    text = "".join(letter if len(letter) == 1 else "\0" for letter in letters)
    found = re.finditer(rf"(?<![A-Za-z]){first}[a-z]+", text)
    return {at for word in found if word[0] in WORDS for at in range(*word.span())}


@pytest.mark.parametrize("name", [name for name in FILES if name not in REFUSED])
def test_the_marks_find_every_answer_or_training_stops(name):
    tokenizer = build_tokenizer_for(FILES[name].read_text())
    markers, unmarked = find_markers(tokenizer)
    assert unmarked == UNMARKED.get(name, [])
    turns, rendered = Turns.parse("every", markers), 0
    for kind, conversation in CONVERSATIONS.items():
        ids = render(tokenizer, conversation)
        if ids is None or not texts_of(conversation) <= words_in(tokenizer, ids):
            continue  # refused or left out
        rendered += 1
        answers, prompts = (columns_of(tokenizer, ids, first) for first in "AQ")
        labels = [token if at in answers else -100 for at, token in enumerate(ids)]
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        if kind in unmarked:
            with pytest.raises(ValueError, match="turn_markers: the labels train"):
                labelled_spans(batch, turns)
            continue
        answer_T = turns.answers(batch["input_ids"])[0][0]
        assert all(answer_T[at] for at in answers), (kind, tokenizer.decode(ids))
        assert not any(answer_T[at] for at in prompts), (kind, tokenizer.decode(ids))
        labelled_spans(batch, turns)
    assert rendered


@pytest.mark.parametrize("name", sorted(REFUSED & FILES.keys()))
def test_a_template_without_marks_is_refused(name):
    with pytest.raises(ValueError, match="the turns of this chat template cannot be t"):
        turn_markers(build_tokenizer_for(FILES[name].read_text()))


def test_a_template_without_a_generation_prompt_says_so():
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    )
    tokenizer = build_tokenizer_for(template + "{# <|user|> <|assistant|> #}")
    with pytest.raises(
        ValueError,
        match="add_generation_prompt adds nothing to it, so at inference a prompt ends "
        r"before the '<\|assistant\|>' that stands before answers. Have the template",
    ):
        turn_markers(tokenizer)


def test_marks_are_as_few_as_will_do():
    def texts(name):
        tokenizer = build_tokenizer_for(FILES[name].read_text())
        found = turn_markers(tokenizer)
        marks = [tokenizer.decode(ids) for ids in found["generation_prompts"]]
        return marks, {tokenizer.decode([token]) for token in found["end_of_turn"]}

    mistral = ["[/INST]", "[/TOOL_RESULTS]"], {"</s>", "[TOOL_RESULTS]"}
    assert texts("axolotl/mistral_v3_tekken") == mistral
    assert texts("axolotl/mistral_v7_tekken") == (["[/INST]"], {"</s>", "[INST]"})
    assert texts("axolotl/phi_3")[0] == ["<|assistant|>\n"]
    assert texts("trl/gptoss") == (
        ["<|start|>assistant", "<|end|><|start|>assistant"],
        {"</s>", "<|end|>", "<|call|>"},
    )
    assert texts("trl/glm4moe")[1] == {"</s>", "<|user|>", "<|observation|>"}
