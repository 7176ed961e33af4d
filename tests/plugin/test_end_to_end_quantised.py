"""Quantised bases through the commands, each in a process of its own."""

import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from command_line import axolotl, loss_on_test_data, losses, reported
from peft import PeftModel
from safetensors.torch import load_file
from training import train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from workspace import ANSWER, build_config, build_workspace

pytestmark = pytest.mark.slow

STEPS = 24
CHECKPOINT = 12
# 3 layers of 4 projections in attention and 3 in the MLP.
LINEAR_LAYERS = 3 * 7


def told(bits):
    return f"the base is quantised: {LINEAR_LAYERS} linear layers in {bits} bits"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace in which `train` has run on a base in 4 bits."""
    directory = tmp_path_factory.mktemp("quantised")
    build_workspace(directory, mlp=64)
    config = build_config(
        directory,
        load_in_4bit=True,
        max_steps=STEPS,
        num_epochs=2,
        save_steps=CHECKPOINT,
    )
    assert told(4) in axolotl("train", config)
    return config


@pytest.fixture(scope="module")
def model(trained):
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    base = AutoModelForCausalLM.from_pretrained(
        trained.parent / "base", quantization_config=nf4, attn_implementation="eager"
    )
    assert sum(type(m) is Linear4bit for m in base.modules()) == LINEAR_LAYERS
    # Trainable as in axolotl evaluate: else bitsandbytes takes a rounder kernel on some
    # CPUs, once nothing is trained.
    return PeftModel.from_pretrained(
        base, trained.parent / "out", is_trainable=True
    ).eval()


def test_training_in_4_bits_learns_and_leaves_an_adapter_alone(trained):
    out = trained.parent / "out"
    numbers = load_file(out / "adapter_model.safetensors")
    assert numbers and all(".intv_" in key for key in numbers)
    assert not list(out.glob("**/model*.safetensors"))
    curve = losses(out, STEPS)
    assert len(curve) == STEPS and curve[STEPS] < 0.5 * curve[1]


def test_a_run_resumed_in_4_bits_has_the_losses_of_an_uninterrupted_one(trained):
    whole, resumed = trained.parent / "out", trained.parent / "resumed"
    resumed.mkdir()
    checkpoint = resumed / f"checkpoint-{CHECKPOINT}"
    shutil.copytree(whole / checkpoint.name, checkpoint)
    output = axolotl(
        "train",
        trained,
        "--output-dir",
        str(resumed),
        "--resume-from-checkpoint",
        str(checkpoint),
    )
    assert told(4) in output
    assert losses(resumed, STEPS) == losses(whole, STEPS)
    ours, theirs = (
        load_file(d / "adapter_model.safetensors") for d in (resumed, whole)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_evaluate_computes_the_loss_on_the_base_in_4_bits(trained, model):
    output = axolotl("evaluate", trained)
    assert told(4) in output
    expected = loss_on_test_data(model, trained.parent)
    assert reported(output, "eval_loss") == pytest.approx(expected, rel=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(trained.parent / "base")
    in_full = PeftModel.from_pretrained(whole, trained.parent / "out").eval()
    # Which a base in full precision would not have given.
    other = loss_on_test_data(in_full, trained.parent)
    assert abs(other - expected) > 1e-3 * expected


def test_inference_answers_on_the_base_in_4_bits(trained):
    output = axolotl("inference", trained, text="c a b d :")
    assert told(4) in output
    assert f"using the LoReFT adapter in {trained.parent / 'out'}" in output
    assert f"<s> c a b d : {ANSWER}" in output


def test_inference_answers_on_a_base_in_8_bits(trained):
    out = trained.parent / "out-8"
    changes = {"load_in_4bit": False, "load_in_8bit": True, "output_dir": str(out)}
    config = build_config(trained.parent, "eight.yml", **changes)
    train(config, steps=STEPS)
    output = axolotl("inference", config, text="c a b d :")
    assert told(8) in output
    assert f"<s> c a b d : {ANSWER}" in output
