"""axolotl's commands in processes of their own, and what they print and leave."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
)
from workspace import ANSWER

LAST_STEP = 96


def axolotl(command, config, *options, text=None, check=True, launcher="python"):
    """Run ``axolotl command config``; the environment's own scripts come first.

    axolotl's own launcher, accelerate, starts two more processes, in 15 s.
    """
    if command != "preprocess":
        options = (*options, "--launcher", launcher)
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": scripts + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(
        ["axolotl", command, str(config), *options],
        input=text,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        cwd=config.parent,
    )
    output = done.stdout + done.stderr
    if check:
        assert done.returncode == 0, output[-5000:]
    else:
        assert done.returncode != 0
    return output


def losses(directory, step=LAST_STEP):
    state = directory / f"checkpoint-{step}" / "trainer_state.json"
    history = json.loads(state.read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def reported(output, metric):
    return float(re.search(rf"{metric}: ([\d.e-]+)", output)[1])


@torch.no_grad()
def loss_on_test_data(model, directory):
    """Mean over samples of the loss at answer tokens, without axolotl."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "base")
    answer = tokenizer(ANSWER, add_special_tokens=False).input_ids + [2]
    total = 0.0
    lines = (directory / "test.jsonl").read_text().splitlines()
    for line in lines:
        prompt = tokenizer(json.loads(line)["instruction"]).input_ids
        labels = torch.tensor([[-100] * len(prompt) + answer])
        total += model(torch.tensor([prompt + answer]), labels=labels).loss.item()
    return total / len(lines)
