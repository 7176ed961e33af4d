"""A prompt typed at `axolotl inference`, beside the same one in training."""

import sys

import pytest
from axolotl import prompters
from axolotl.utils.dict import DictDefault
from chat import build_chat_tokenizer

from axolotl_reft.plugin import prompt_forms, running
from axolotl_reft.plugin.plugin import LoreftPlugin
from axolotl_reft.plugin.prompt_forms import warn_of_other_prompts

RAW = {"format": "{instruction}", "no_input_format": "{instruction}"}


@pytest.fixture
def warned(monkeypatch):
    """What is told for the first data set's type, settings, and a command line."""
    tokenizer = build_chat_tokenizer("chatml")
    monkeypatch.setattr(prompt_forms, "load_tokenizer", lambda cfg: tokenizer)

    def warned(kind, *options, **settings):
        told = []
        monkeypatch.setattr(
            prompt_forms.LOG, "warning", lambda form, *parts: told.append(form % parts)
        )
        monkeypatch.setattr(sys, "argv", ["inference.py", "my.yml", *options])
        dataset = {"path": "x.jsonl", "type": kind}
        if "data" in settings:
            dataset |= settings.pop("data")
        cfg = {"axolotl_config_path": "my.yml", "sequence_len": 64, **settings}
        cfg["datasets"] = [dataset]
        warn_of_other_prompts(DictDefault(cfg), chat="--chat" in options)
        assert len(told) < 2
        return "".join(told)

    return warned


@pytest.mark.parametrize(
    ("kind", "prompter"),
    [
        ("alpaca", "AlpacaPrompter"),
        ("gpteacher", "AlpacaPrompter"),
        ("alpaca_instruct.load_no_prompt", "UnpromptedPrompter"),
        ("summarizetldr", "SummarizeTLDRPrompter"),
        ("concisechoice", "MultipleChoiceConcisePrompter"),
    ],
)
def test_a_prompters_name_is_told(warned, kind, prompter):
    form = next(getattr(prompters, prompter)().build_prompt("{instruction}"))
    told = warned(kind)
    assert f"training put prompts into the form {form!r}" in told
    command = f"Run axolotl inference my.yml --prompter {prompter}"
    assert told.endswith(command)
    assert warned(kind, "--gradio").endswith(f"{command} --gradio")
    # A chat template is no help, and --chat takes no prompter.
    assert warned(kind, chat_template="chatml").endswith(command)
    assert warned(kind, "--chat").endswith(command)
    assert warned(kind, "--prompter", prompter) == ""
    assert warned(kind, f"--prompter={prompter}") == ""


@pytest.mark.parametrize(
    ("commands", "remedy"),
    [
        (["axolotl.cli.inference"], "do_sample=False"),
        (["axolotl.cli.inference", "axolotl.cli.chat"], "/set repetition_penalty 1"),
        (["axolotl.evaluate"], None),
    ],
)
def test_axolotls_sampling_is_told(monkeypatch, commands, remedy):
    told = []
    monkeypatch.setattr(
        prompt_forms.LOG, "info", lambda form, *parts: told.append(form % parts)
    )
    monkeypatch.setattr(running, "is_running", lambda name: name in commands)
    LoreftPlugin().post_model_load(DictDefault({"adapter": "loreft"}), None)
    assert [remedy in text for text in told] == ([True] if remedy else [])


def test_a_form_without_a_prompter_can_be_typed(warned):
    form = {"no_input_format": "[INST] {instruction} [/INST]", "system_prompt": "Now "}
    told = warned(form)
    assert "the form 'Now [INST] {instruction} [/INST]'" in told
    assert told.endswith("Run axolotl inference my.yml, and type the whole form")
    told = warned("alpaca:chat", chat_template="chatml")
    assert "USER: {instruction}\\nASSISTANT:'" in told
    assert "my.yml, without chat_template: in the config, and type the who" in told


def test_unless_it_ends_with_a_space_which_is_cut_off(warned):
    told = warned({"no_input_format": "Q: {instruction}\nA:\n"})
    assert "cannot be typed" in told and "PeftModel.from_pretrained" in told


@pytest.mark.parametrize(
    "kind", [RAW, "completion", "input_output", "pygmalion", "no_such", None]
)
def test_nothing_is_told_where_nothing_is_known_to_differ(warned, kind):
    assert warned(kind) == ""


def test_what_the_tokenizer_drops_does_not_differ(warned, monkeypatch):
    class Stripping:
        def __call__(self, text):
            return DictDefault(input_ids=[ord(letter) for letter in text.strip()])

    monkeypatch.setattr(prompt_forms, "load_tokenizer", lambda cfg: Stripping())
    assert warned({"no_input_format": "{instruction} "}) == ""


def test_a_raw_prompt_in_a_chat_template_differs(warned):
    assert "the form '{instruction}'" in warned(RAW, chat_template="chatml")
    assert "the form '{instruction}'" in warned(RAW, "--chat")


def test_a_chat_template_that_inference_takes_up_is_right(warned):
    assert warned("chat_template") == ""
    assert warned("chat_template", "--gradio") == ""
    assert warned("chat_template", "--chat") == ""
    assert warned("chat_template.default", chat_template="llama3") == ""
    # The tokenizer's own, which --chat takes at last.
    assert warned("chat_template.default", "--chat") == ""


def test_a_chat_template_that_inference_leaves_out_is_named(warned):
    told = warned("chat_template.default")
    assert told.endswith(
        "Write chat_template: tokenizer_default at the top of the config"
    )
    other = {"data": {"chat_template": "gemma"}}
    assert "chat_template: gemma at" in warned("chat_template.default", **other)
    assert "chat_template: gemma at" in warned(
        "chat_template", chat_template="llama3", **other
    )
    own = {"chat_template": "jinja", "chat_template_jinja": "{{ messages }}"}
    told = warned("chat_template", chat_template="llama3", data=own)
    assert told.endswith("at the top of the config, with its chat_template_jinja")


def test_preference_data_is_spoken_of_only_with_a_chat_template(warned):
    assert warned("chatml.intel", rl="dpo") == ""
    assert "chat_template: tok" in warned("chat_template.default", rl="dpo")
    assert warned("alpaca", reward_model=True) == ""


def test_a_form_that_cannot_be_found_out_stops_nobody(warned, monkeypatch):
    def fails(*_):
        raise KeyError("of a strategy")

    monkeypatch.setattr(prompt_forms, "load", fails)
    assert warned("alpaca") == ""
