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

from axolotl_reft.model_card import add_section, extend_pefts_cards
from axolotl_reft.model_card import keep_in_trainers_card as keep


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
    assert "positions `f2+l3`\n(the first 2 and the last 3 tokens of a pr" in card.text
    assert "rank 2 in layers 0, 3 in layers all, tied_weights True" in card.text
    # PEFT's own parts stay.
    assert "## Model Details" in card.text and "- PEFT 0." in card.text
    assert card.text.index("## LoReFT adapter") < card.text.index("## Model Details")


def test_the_cards_three_lines_load_the_adapter(based, tmp_path, tokens):
    based.save_pretrained(tmp_path)
    code = re.search(
        r"```python\n(import axolotl_reft.*?)```",
        (tmp_path / "README.md").read_text(),
        re.DOTALL,
    )[1]
    assert len(code.splitlines()) == 3
    names = {}
    exec(code.replace("path/or/hub-id/of/this/adapter", str(tmp_path)), names)
    ids = tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(names["model"](ids).logits, based.eval()(ids).logits)


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
