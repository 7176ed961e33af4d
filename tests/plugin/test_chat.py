"""The plugin finds the marks of the data's chat templates and saves them."""

import pytest
from axolotl.utils.chat_templates import get_chat_template
from axolotl.utils.dict import DictDefault
from chat import build_chat_tokenizer
from conftest import build_model

from axolotl_reft import turn_markers
from axolotl_reft.plugin import prompt_forms
from axolotl_reft.plugin.args import LoreftBlock
from axolotl_reft.plugin.plugin import LoreftPlugin


def config(directory, *datasets, **settings):
    block = LoreftBlock().model_dump()
    return DictDefault(
        {
            "adapter": "loreft",
            "loreft": {key: value for key, value in block.items() if value is not None},
            "base_model": str(directory),
            "tokenizer_config": str(directory),
            "datasets": list(datasets),
            **settings,
        }
    )


@pytest.fixture
def base(tmp_path):
    build_chat_tokenizer("chatml").save_pretrained(tmp_path)
    build_model().config.save_pretrained(tmp_path)
    return tmp_path


CHAT = {"path": "x.jsonl", "type": "chat_template"}


def test_the_adapter_gets_the_marks_of_its_data(base):
    _, saved = LoreftPlugin().load_adapter(None, config(base, CHAT), config_only=True)
    assert saved.turn_markers == turn_markers(build_chat_tokenizer("chatml"))
    assert saved.turns == "every"


def test_each_data_set_has_its_own_template(base):
    other = {**CHAT, "chat_template": "llama3"}
    again = {"path": "y.jsonl", "type": "chat_template.default"}
    found = prompt_forms.markers_of_data(config(base, CHAT, other, again))
    tokenizer = build_chat_tokenizer("chatml")
    both = [turn_markers(tokenizer, get_chat_template(t)) for t in ("chatml", "llama3")]
    assert found["generation_prompts"] == [m["generation_prompts"][0] for m in both]
    assert set(found["end_of_turn"]) == {t for m in both for t in m["end_of_turn"]}


def test_the_template_of_the_config_is_the_data_sets(base):
    found = prompt_forms.markers_of_data(config(base, CHAT, chat_template="gemma"))
    tokenizer = build_chat_tokenizer("chatml")
    assert found == turn_markers(tokenizer, get_chat_template("gemma"))


def test_data_without_a_chat_template_has_no_marks(base, monkeypatch):
    monkeypatch.setattr(prompt_forms, "load_tokenizer", None)  # not even asked for
    alpaca = {"path": "x.jsonl", "type": "alpaca"}
    assert prompt_forms.markers_of_data(config(base, alpaca)) is None


def test_kinds_of_turns_without_marks_are_named(base, monkeypatch):
    told = []
    monkeypatch.setattr(prompt_forms.LOG, "info", lambda *message: told.append(message))
    twice = "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    twice += "<|assistant|>{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    data = {**CHAT, "chat_template": "jinja", "chat_template_jinja": twice}
    found = prompt_forms.markers_of_data(config(base, data))
    tokenizer = build_chat_tokenizer("chatml")
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert found["generation_prompts"] == [[assistant]]
    message = told[0][0] % told[0][1:]
    assert "turn markers do not find the answers of" in message
    assert "several answers in a row, an answer that begins" in message


def test_a_template_without_marks_is_named(base, monkeypatch):
    told = []
    monkeypatch.setattr(
        prompt_forms.LOG, "warning", lambda *message: told.append(message)
    )
    plain = {
        **CHAT,
        "chat_template": "jinja",
        "chat_template_jinja": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    assert prompt_forms.markers_of_data(config(base, plain)) is None
    message = told[0][0] % told[0][1:]
    assert "no token stands between a question and its answer" in message
    assert "a whole conversation counts as one prompt" in message


@pytest.mark.parametrize(
    "remedy",
    [{"special_tokens": {"eos_token": "<|im_end|>"}}, {"tokens": ["<|im_end|>"]}],
)
def test_an_end_that_the_tokenizer_spells_is_named_with_what_helps(
    tmp_path, monkeypatch, remedy
):
    told = []
    monkeypatch.setattr(
        prompt_forms.LOG, "warning", lambda *message: told.append(message)
    )
    tokenizer = build_chat_tokenizer("chatml", without=("<|im_start|>", "<|im_end|>"))
    tokenizer.save_pretrained(tmp_path)
    build_model().config.save_pretrained(tmp_path)
    assert prompt_forms.markers_of_data(config(tmp_path, CHAT)) is None
    message = told[0][0] % told[0][1:]
    assert (
        "it ends answers with <|im_end|>, which this tokenizer does not have as one "
        "special token. Add it with special_tokens: {eos_token: '<|im_end|>'}, or under"
        " tokens:, and train its embedding with loreft: modules_to_save: ["
    ) in message
    assert "such as chatml" not in message
    # As validation sets it from the block.
    trained = {"lora_modules_to_save": ["embed_tokens", "lm_head"]}
    found = prompt_forms.markers_of_data(config(tmp_path, CHAT, **trained, **remedy))
    assert len(tokenizer) in found["end_of_turn"] and len(told) == 1
