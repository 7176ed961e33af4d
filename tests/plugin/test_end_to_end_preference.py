"""Preference and reinforcement training as users run it, by the command line."""

import json
import shutil

import pytest
import torch
from command_line import axolotl, losses, reported
from peft import PeftModel
from preferences import build_preference_workspace
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow


def train(directory, method, **changes):
    config = build_preference_workspace(
        directory, method, count=32, num_epochs=3, save_steps=12, **changes
    )
    output = axolotl("train", config)
    assert f"trainable params: {3 * 2 * (2 * 4 * 64 + 4):,} ||" in output
    return config, directory / f"out-{method}"


def m_over_n(model, directory):
    """How much likelier m is than n as the answer, in nats, over some prompts."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "base")
    m, n = tokenizer.convert_tokens_to_ids(["m", "n"])
    with torch.no_grad():
        prompts = [tokenizer(f"{p} :", return_tensors="pt") for p in ("a b c d", "l k")]
        logits = [model(**prompt).logits[0, -1] for prompt in prompts]
    return min((row[m] - row[n]).item() for row in logits)


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "grpo"])
def test_it_trains_saves_and_answers(tmp_path, method):
    _, out = train(tmp_path, method)
    assert not list(out.rglob("model*.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, out).eval()
    with model.disable_adapter():
        before = m_over_n(model, tmp_path)
    after = m_over_n(model, tmp_path)
    assert after > before + (0.0 if method == "grpo" else 1.0)
    prompt = torch.tensor([[1, 5, 6, 7, 30]])
    answer = model.generate(input_ids=prompt, max_new_tokens=3, pad_token_id=0)
    assert answer.shape[1] > prompt.shape[1]


def test_a_resumed_run_and_the_evaluation_of_dpo(tmp_path):
    config, out = train(tmp_path, "dpo", seed=5)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(out / "checkpoint-12", resumed / "checkpoint-12")
    options = ["--resume-from-checkpoint", str(resumed / "checkpoint-12")]
    axolotl("train", config, "--output-dir", str(resumed), *options)
    last = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    assert losses(resumed, last) == losses(out, last)
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (resumed, out))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    output = axolotl("evaluate", config)
    state = json.loads((out / f"checkpoint-{last}" / "trainer_state.json").read_text())
    margins = [e["rewards/margins"] for e in state["log_history"] if "loss" in e]
    # The bare base, which is what axolotl hands over, would have a margin of 0.
    assert reported(output, "eval_rewards/margins") > 0.5 * margins[-1] > 0
