"""axolotl's commands in processes of their own, and what they print and leave."""

import json
import os
import re
import sys
from pathlib import Path

import torch
from axolotl.cli.main import cli
from forks import run_forked
from transformers import (
    AutoTokenizer,
)
from workspace import ANSWER

LAST_STEP = 96
# The environment's own scripts come first.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
LAUNCHED = ("train", "evaluate", "inference")


def axolotl(command, config, *options, text="", check=True, launcher="python"):
    """Run ``axolotl command config`` in a process forked for it.

    axolotl's own launcher, accelerate, starts two more, which import all anew.
    """
    if command in LAUNCHED:
        options = (*options, "--launcher", launcher)
    line = [command, str(config), *options]
    code, output = run_forked(_axolotl, line, directory=config.parent, text=text)
    if check:
        assert code == 0, output[-5000:]
    else:
        assert code != 0
    return output


def _axolotl(line):
    os.environ["PATH"] = PATH
    sys.argv = ["axolotl", *line]
    cli()


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
