#!/usr/bin/env bash
# One would guess: position ids that begin anew keep packed samples of a row apart in
# Llama, whether or not the forward also returns a cache that nobody asked for.
#
# What happens: only with use_cache=False. By default a forward makes a cache, and the
# attention mask is then made without a look at the position ids: the second sample
# sees the first, and its logits are others by more than their own size. Nothing is
# said. Trainers that leave the config's use_cache as it is (true) train on that.
#
# Version: transformers 5.16.1, torch 2.13.0 (CPU), Python 3.11.
# Source: running this; in masking_utils.py packed samples are looked for where
# past_key_values is None.
#
# Met in: comparing forwards in two parts with the plain one, on packed rows.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.16.1 numpy
"$work/venv/bin/python" - <<'PYTHON' 2>"$work/log" || { cat "$work/log"; exit 1; }
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

FIRST, SECOND = 12, 8
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, initializer_range=0.2,
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(1, 64, (1, FIRST + SECOND))
positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]
off = {}
with torch.no_grad():
    alone = model(ids[:, FIRST:]).logits
    for name, given in (("by default", {}), ("use_cache=False", {"use_cache": False})):
        logits = model(ids, position_ids=positions, **given).logits
        off[name] = float((logits[:, FIRST:] - alone).abs().max())
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"logits of the second sample alone: up to {float(alone.abs().max()):.3g}")
for name, difference in off.items():
    print(f"packed, {name}: off by up to {difference:.3g}")
assert off["use_cache=False"] < 1e-4, "samples are joined without a cache too"
assert off["by default"] > 0.1, "samples are kept apart beside a cache now"
PYTHON
