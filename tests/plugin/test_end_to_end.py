"""The commands as users run them, each in a process of its own."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from command_line import (
    LAST_STEP,
    PATH,
    axolotl,
    loss_on_test_data,
    losses,
    reported,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from workspace import (
    ANSWER,
    build_base,
    build_config,
    build_reward_workspace,
    build_workspace,
)

pytestmark = pytest.mark.slow

CHECKPOINT = 48
# What the frameworks log then.
DATA_IS_READ = "Loading raw datasets"
BASE_IS_LOADED = "Loading weights"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace in which `preprocess` and `train` have run."""
    config = build_workspace(tmp_path_factory.mktemp("workspace"))
    preprocess = axolotl("preprocess", config)
    assert "Success! Preprocessed data path" in preprocess
    assert DATA_IS_READ in preprocess
    # As users do it: by the script, with axolotl's own launcher.
    train = subprocess.run(
        ["axolotl", "train", config],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PATH": PATH},
    )
    output = train.stdout + train.stderr
    assert train.returncode == 0, output[-5000:]
    assert BASE_IS_LOADED in output
    # 3 layers, 2 sides, 2·r·d + r
    assert f"trainable params: {3 * 2 * (2 * 4 * 64 + 4):,} ||" in output
    return config


def test_training_leaves_an_adapter_and_nothing_of_the_base(trained):
    out = trained.parent / "out"
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LOREFT" and settings["positions"] == "f2+l2"
    numbers = load_file(out / "adapter_model.safetensors")
    assert numbers and all(".intv_" in key for key in numbers)
    assert not list(out.glob("model*.safetensors"))
    for checkpoint in out.glob("checkpoint-*"):
        assert (checkpoint / "adapter_config.json").is_file()
        assert not list(checkpoint.glob("model*.safetensors"))
    curve = losses(out)
    assert len(curve) == LAST_STEP
    assert curve[LAST_STEP] < 0.3 * curve[1]


@pytest.mark.parametrize("way", ["resume_from_checkpoint", "auto_resume"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(trained, way):
    whole = trained.parent / "out"
    resumed = trained.parent / way
    resumed.mkdir()
    shutil.copytree(
        whole / f"checkpoint-{CHECKPOINT}", resumed / f"checkpoint-{CHECKPOINT}"
    )
    if way == "auto_resume":
        options = ["--auto-resume-from-checkpoints"]
    else:
        checkpoint = resumed / f"checkpoint-{CHECKPOINT}"
        options = ["--resume-from-checkpoint", str(checkpoint)]
    axolotl("train", trained, "--output-dir", str(resumed), *options)
    assert losses(resumed) == losses(whole)
    ours, theirs = (
        load_file(d / "adapter_model.safetensors") for d in (resumed, whole)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture(scope="module")
def model(trained):
    base = AutoModelForCausalLM.from_pretrained(trained.parent / "base")
    return PeftModel.from_pretrained(base, trained.parent / "out").eval()


def test_evaluate_uses_the_trained_adapter(trained, model):
    output = axolotl("evaluate", trained)
    expected = loss_on_test_data(model, trained.parent)
    assert reported(output, "eval_loss") == pytest.approx(expected, rel=1e-4)


def test_inference_answers_from_the_trained_adapter(trained, model):
    prompt = "c a b d :"
    output = axolotl("inference", trained, text=prompt)
    assert f"using the LoReFT adapter in {trained.parent / 'out'}" in output
    assert f"<s> {prompt} {ANSWER}" in output
    with torch.no_grad(), model.disable_adapter():
        ids = AutoTokenizer.from_pretrained(trained.parent / "base")(
            prompt, return_tensors="pt"
        )
        probable = model(**ids).logits[0, -1].softmax(-1)
    # The base alone would hardly have said it.
    assert probable[ids.input_ids.new_tensor(16)] < 0.1


@pytest.mark.parametrize("command", ["evaluate", "inference"])
def test_without_a_trained_adapter_there_is_no_answer(trained, command):
    output = axolotl(
        command, trained, "--output-dir", "nowhere", text="a b :", check=False
    )
    assert "output_dir: there is no trained LoReFT adapter in 'nowhere'" in output
    assert BASE_IS_LOADED not in output


def test_packed_samples_have_the_same_loss(trained, model):
    config = build_config(
        trained.parent,
        "packed.yml",
        sample_packing=True,
        eval_sample_packing=True,
        pad_to_sequence_len=True,
        micro_batch_size=1,
        sequence_len=256,
        dataset_prepared_path=str(trained.parent / "prepared-packed"),
    )
    output = axolotl("evaluate", config)
    # All 16 in one row, whose mean over tokens is that over answers of equal length.
    expected = loss_on_test_data(model, trained.parent)
    assert reported(output, "eval_loss") == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_a_reward_model_learns_and_is_loaded_with_its_head(tmp_path):
    config = build_reward_workspace(tmp_path)
    axolotl("train", config)
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1
    )
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert "score" in str(list(load_file(tmp_path / "out/adapter_model.safetensors")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    prompts = ["h a c b :", "b g :", "a b c d e f g h :"]

    def reward(answer):
        texts = [f"{prompt} {answer} :" for prompt in prompts]
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits

    assert (reward("m n") > reward("n m") + 1).all()


def test_a_base_of_another_size_stops_before_it_loads(trained):
    build_base(trained.parent / "wider", hidden_size=96)
    output = axolotl(
        "inference", trained, "--base-model", str(trained.parent / "wider"), check=False
    )
    assert "was trained on a base model of hidden size 64, this base has 96" in output
    assert BASE_IS_LOADED not in output


def test_a_mistake_stops_before_the_data_is_read(trained):
    config = build_config(
        trained.parent,
        "mistake.yml",
        loreft={"layers": "0-9"},
        dataset_prepared_path=str(trained.parent / "prepared-never"),
    )
    output = axolotl("train", config, check=False)
    assert "layers: 9 in '0-9' is out of range, the base model has 3 layers" in output
    assert DATA_IS_READ not in output and BASE_IS_LOADED not in output
