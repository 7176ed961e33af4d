"""What a saved adapter says of itself to whoever finds it."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from conftest import build_adapter, build_model
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from workspace import build_tokenizer

from axolotl_reft import LoreftConfig, turn_markers
from axolotl_reft.saved.card import add_section, extend_pefts_cards, section
from axolotl_reft.saved.card import keep_in_trainers_card as keep

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ ' : ' if m['role'] == 'assistant' }}"
    "{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
    "{{ ' : ' if add_generation_prompt }}"
)


@pytest.fixture
def based(tmp_path):
    """A model with an adapter, whose base is on disk."""
    build_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return build_adapter(base, positions="f2+l3", rank={"0": 2, "all": 3})


def test_a_saved_adapter_has_a_card_that_says_what_it_is(based, tmp_path):
    based.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"loreft", "reft"} <= set(card.data.tags)
    assert card.data.library_name == "peft" and card.data.base_model
    assert (
        "positions `f2+l3`:\nthe first 2 tokens and the last 3 tokens of a prompt, "
        "at most half of a prompt each." in card.text
    )
    assert "rank 2 in layers 0, 3 in layers all, tied_weights True" in card.text
    # PEFT's own parts stay.
    assert "## Model Details" in card.text and "- PEFT 0." in card.text
    assert card.text.index("## LoReFT adapter") < card.text.index("## Model Details")


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ("l1", "the last token of a prompt, at most half of a prompt."),
        ("f1+l2", "the first token and the last 2 tokens of a prompt, at most half of"),
        ("all", "every token, generated ones too."),
    ],
)
def test_positions_in_words(positions, words):
    assert words in section(LoreftConfig(positions=positions))


def test_what_was_trained_beside_the_edits_is_named():
    assert "base model's weights are frozen\n\n" in section(LoreftConfig())
    whole = section(LoreftConfig(modules_to_save=["lm_head", "embed_tokens"]))
    assert "frozen, but for `embed_tokens` and `lm_head`, trained whole" in whole
    # Both names that PEFT adds for a classifier are one head.
    head = section(LoreftConfig(modules_to_save=["classifier", "score"]))
    assert "frozen, but for the classifier's head, trained whole" in head
    lora = section(LoreftConfig(lora={"r": 4, "target_modules": ["q_proj", "v_proj"]}))
    assert "LoRA beside it in all layers, on every token: r 4, target_modules `" in lora


def test_a_component_that_names_its_layer_is_not_in_all_layers():
    text = section(LoreftConfig(component="model.layers[1].mlp.output"))
    assert "- component `model.layers[1].mlp.output`" in text
    assert "layers `all`, component `block_output`" in section(LoreftConfig())


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("chat", [False, True])
def test_the_cards_code_has_the_adapter_answer(based, tmp_path, capsys, saved, chat):
    tokenizer = build_tokenizer()
    content = "A prompt, as in training"
    if chat:
        tokenizer.chat_template = CHAT
        config = based.peft_config["default"]
        config.turn_markers = turn_markers(tokenizer)
        content = "<s> A question : "
    tokenizer.save_pretrained(tmp_path / ("out" if saved else "base"))
    based.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    form = "the chat template, by whose marks" if chat else "the same prompt template"
    assert f"the form that it had in training: {form}" in text
    code = re.search(r"```python\n(import axolotl_reft.*?)```", text, re.DOTALL)[1]
    assert len(code.splitlines()) <= 14
    names = {}
    capsys.readouterr()
    exec(code.replace("path/or/hub-id/of/this/adapter", str(tmp_path / "out")), names)
    ids = tokenizer(content, add_special_tokens=not chat, return_tensors="pt").input_ids
    assert torch.equal(names["inputs"].input_ids, ids)
    expected = based.generate(ids, max_new_tokens=100)[0, ids.shape[1] :]
    assert torch.equal(names["answer"], expected) and len(expected)
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed == tokenizer.decode(expected, skip_special_tokens=True)


def test_an_adapter_of_another_task_is_loaded(tmp_path):
    code = section(LoreftConfig(task_type="SEQ_CLS"), "me/adapter")
    assert (
        'AutoPeftModelForSequenceClassification.from_pretrained("me/adapter")' in code
    )
    assert "generate" not in code


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            "This model was trained from scratch on the a.jsonl dataset.",
            "This is an adapter, trained on the a.jsonl dataset with the base model's "
            "weights frozen.",
        ),
        (
            "This model is a fine-tuned version of [None](https://huggingface.co/None).",
            "This is an adapter, trained with the base model's weights frozen.",
        ),
        (
            "This model is a fine-tuned version of [a/b](https://huggingface.co/a/b).",
            "This model is a fine-tuned version of [a/b](https://huggingface.co/a/b).",
        ),
    ],
)
def test_nobody_trained_it_from_scratch(tmp_path, written, expected):
    card = tmp_path / "README.md"
    card.write_text(f"---\ntags: []\n---\n# Mine\n\n{written}\n\n## More\n")
    add_section(str(tmp_path), LoreftConfig())
    assert f"# Mine\n\n{expected}\n\n<!-- LoReFT" in card.read_text()


def test_saving_again_replaces_the_section(based, tmp_path):
    for _ in range(2):
        based.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    based.peft_config["default"].positions = "all"
    based.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert first.count("## LoReFT adapter") == text.count("## LoReFT adapter") == 1
    assert "every token, generated ones too" in text and "f2+l3" not in text


def test_other_methods_cards_are_pefts_alone(tmp_path):
    extend_pefts_cards()
    lora = get_peft_model(build_model(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    assert "LoReFT" not in (tmp_path / "README.md").read_text()


def test_extending_twice_extends_once():
    before = PeftModel.create_or_update_model_card
    extend_pefts_cards()
    assert PeftModel.create_or_update_model_card is before


@pytest.fixture
def hub(monkeypatch):
    """What would have been uploaded: the card, and the names of the files."""
    sent = {}

    def upload_folder(repo_id, folder_path, **_):
        folder = transformers.trainer.Path(folder_path)
        sent[repo_id] = (folder / "README.md").read_text()
        sent["files"] = {file.name for file in folder.iterdir()}

    api = SimpleNamespace(
        create_repo=lambda name, **_: SimpleNamespace(repo_id=name),
        upload_folder=upload_folder,
    )
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: api)
    return sent


def test_what_a_trainer_pushes_has_the_section(based, tmp_path, hub):
    arguments = TrainingArguments(
        str(tmp_path / "out"), hub_model_id="me/adapter", report_to=[], use_cpu=True
    )
    trainer = Trainer(based, arguments, train_dataset=[{"input_ids": [1]}])
    trainer.push_to_hub()
    assert "## LoReFT adapter" in hub["me/adapter"]
    assert "trained from scratch" not in hub["me/adapter"]
    assert "This is an adapter, trained on an unknown dataset with" in hub["me/adapter"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub["files"]


def test_a_card_that_knows_nothing_of_peft_gets_the_section_too(based, tmp_path):
    """TRL's trainers write theirs without asking the model."""

    def write():
        (tmp_path / "README.md").write_text(
            "---\ntags: [trl]\n---\n# Mine\n\n## Cite\n"
        )

    trainer = SimpleNamespace(
        create_model_card=write,
        is_world_process_zero=lambda: True,
        args=SimpleNamespace(output_dir=str(tmp_path), hub_model_id="me/adapter"),
    )
    keep(trainer, based.peft_config["default"])
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert set(card.data.tags) == {"trl", "loreft", "reft"}
    assert 'from_pretrained("me/adapter")' in card.text
    assert (
        card.text.index("# Mine")
        < card.text.index("## LoReFT")
        < card.text.index("## Cite")
    )


def test_without_a_card_there_is_nothing_to_add_to(based, tmp_path):
    add_section(str(tmp_path / "base"), based.peft_config["default"])
    assert not (tmp_path / "base/README.md").exists()
