#!/usr/bin/env bash
# One would guess: position ids that begin anew keep packed samples of a row apart, since
# transformers makes attention masks from them (Llama's logits are those of each sample).
#
# What happens: GPT-OSS, Falcon and OPT make their masks without the position ids. On
# eager attention a packed sample sees the one before it, and its logits are others.
# Nothing is said.
#
# Version: transformers 5.16.1, torch 2.13.0 (CPU), Python 3.11.
# Source: running this; in modeling_gpt_oss.py create_causal_mask is not given
# position_ids.
#
# Met in: comparing packed samples with each alone, on every architecture.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.16.1 numpy
"$work/venv/bin/python" - <<'PYTHON' 2>"$work/log" || { cat "$work/log"; exit 1; }
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "word_embed_proj_dim": 32, "max_position_embeddings": 64,
}
KINDS = {
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "falcon": {"alibi": False},
    "opt": {},
    "llama": {},
}

print("transformers", transformers.__version__, "torch", torch.__version__)
joined = set()
for kind, settings in KINDS.items():
    settings = SIZES | settings
    if kind == "falcon":  # computes it
        settings.pop("head_dim")
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    config.initializer_range = config.init_std = 0.2
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    first, second = torch.randint(3, 64, (1, 8)), torch.randint(3, 64, (1, 8))
    places = torch.arange(8).repeat(2)[None]
    with torch.no_grad():
        row = torch.cat([first, second], 1)
        packed = model.eval()(row, position_ids=places, use_cache=False).logits
        alone = model(second, position_ids=places[:, :8], use_cache=False).logits
    difference = ((packed[:, 8:] - alone).abs().max() / alone.abs().max()).item()
    print(f"{kind}: the second sample packed and alone differ by {difference:.0e}")
    if difference > 1e-3:
        joined.add(kind)
assert joined == {"gpt_oss", "falcon", "opt"}, f"this has changed: {joined}"
PYTHON
