"""A run of axolotl that logs its edits, and pushes its adapter with a card."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from axolotl.cli.train import do_cli
from forks import run_forked
from transformers import trainer
from workspace import build_config, build_workspace

pytestmark = pytest.mark.slow


def train(config, uploaded):
    """With the hub's API in memory: what would be uploaded is copied instead."""
    trainer.hf_api = lambda: SimpleNamespace(
        create_repo=lambda name, **_: SimpleNamespace(repo_id=name),
        upload_folder=lambda repo_id, folder_path, **_: shutil.copytree(
            folder_path, uploaded, dirs_exist_ok=True
        ),
    )
    os.environ["ACCELERATE_USE_CPU"] = "true"
    do_cli(str(config))


def test_a_pushed_adapter_has_axolotls_card_and_our_section(tmp_path):
    build_workspace(tmp_path)
    config = build_config(
        tmp_path, max_steps=3, hub_model_id="me/adapter", hub_strategy="end"
    )
    uploaded = tmp_path / "uploaded"
    code, output = run_forked(train, config, uploaded, directory=tmp_path)
    assert code == 0, output[-5000:]
    card = (uploaded / "README.md").read_text()
    assert "## LoReFT adapter" in card and 'from_pretrained("me/adapter")' in card
    assert "This is an adapter, trained on the " in card
    assert "from scratch" not in card
    # axolotl saves the tokenizer with the adapter.
    assert 'AutoTokenizer.from_pretrained("me/adapter")' in card
    assert "axolotl version: " in card and "library_name: peft" in card
    settings = json.loads((uploaded / "adapter_config.json").read_text())
    assert settings["format_version"] == 1 and settings["axolotl_reft_version"]
    assert (uploaded / "adapter_model.safetensors").is_file()
    # What it edited was told before the first step, and logged.
    assert "LoReFT edits at f2+l2 in the first samples" in output
    assert "  answer   m" in output
    (state,) = (tmp_path / "out").glob("checkpoint-3/trainer_state.json")
    first = json.loads(state.read_text())["log_history"][0]
    assert {f"loreft/edit_size/layer_{n}" for n in range(3)} < set(first)
    assert {f"loreft/grad_norm/layer_{n}" for n in range(3)} < set(first)
