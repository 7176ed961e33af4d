#!/usr/bin/env bash
# One would guess: TrainingArguments(bf16=False, fp16=False) trains in the model's own
# precision, and what trained before in the same process has no say in it.
#
# What happens: axolotl, before it trains, writes its config's precision to the environment
# variable ACCELERATE_MIXED_PRECISION and leaves it there. transformers reads that wherever
# neither fp16 nor bf16 is true, so that False cannot overrule it: the next Trainer of
# the process computes its forward passes in bfloat16, although its arguments still say
# bf16=False and the model's parameters are float32. Nothing is logged. It happens in
# notebooks, in test suites and wherever several trainings share a process; removing the
# variable after axolotl ends it. Another training by axolotl sets it anew.
#
# Version: axolotl 0.19.0, transformers 5.16.1, accelerate 1.13.0, torch 2.13.0 (CPU).
# Source: running this; prepare_optim_env in axolotl/utils/trainer.py, step 5 of
#   TrainingArguments.__post_init__ in transformers/training_args.py.
#
# Met in: losses of later tests, which differed after a test that trained with bf16.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet axolotl==0.19.0 torch==2.13.0 \
  transformers==5.16.1 accelerate==1.13.0
cd "$work"
AXOLOTL_DO_NOT_TRACK=1 "$work/venv/bin/python" - <<'PYTHON' 2>log || { cat log; exit 1; }
import os

import axolotl
import torch
import transformers
from axolotl.utils.dict import DictDefault
from axolotl.utils.trainer import prepare_optim_env
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def precision():
    """Train one step in float32; return the dtype in which a linear layer computed."""
    sizes = {
        "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    arguments = TrainingArguments(
        "out", bf16=False, fp16=False, max_steps=1, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )
    assert not arguments.bf16 and next(model.parameters()).dtype == torch.float32
    Trainer(model, arguments, train_dataset=[row]).train()
    return seen[0]


found = {"before axolotl": precision()}
prepare_optim_env(DictDefault(bf16=True))
found["after axolotl's bf16: true"] = precision()
del os.environ["ACCELERATE_MIXED_PRECISION"]
found["with the variable removed"] = precision()
print(f"axolotl {axolotl.__version__}, transformers {transformers.__version__}, bf16=False:")
for when, dtype in found.items():
    print(f"  {when}: {dtype}")
assert list(found.values()) == [torch.float32, torch.bfloat16, torch.float32]
PYTHON
