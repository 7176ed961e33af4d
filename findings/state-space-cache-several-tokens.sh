#!/usr/bin/env bash
# One would guess: with a cache, the tokens of a text can be passed in two pieces, as in
# chunked prefill or to score an answer on a cached prompt, and the logits are those of
# the whole text in one forward.
#
# What happens: with state-space layers the second piece gives other logits where it has
# several tokens, and the same where it has one. Nothing is said. Mamba, FalconMamba and
# Jamba differ; Mamba 2, and Llama with its keys and values, agree.
#
# Version: transformers 5.16.1, torch 2.13.0 (CPU), Python 3.11.
# Source: running this.
#
# Met in: a sweep that compares every architecture with and without a cache.
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
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
}
KINDS = {
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 4},
    "jamba": {
        "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2,
        "attn_layer_offset": 1, "use_mamba_kernels": False, "num_experts": 2,
    },
    "mamba2": {
        "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2,
        "chunk_size": 4,
    },
    "llama": {},
}


def difference(model, ids, start):
    """Between the tokens from ``start`` on behind a cache, and in the whole."""
    whole = model(ids).logits[:, start:]
    first = model(ids[:, :start], use_cache=True)
    name = "cache_params" if "cache_params" in first else "past_key_values"
    behind = model(ids[:, start:], use_cache=True, **{name: first[name]}).logits
    return ((behind - whole).abs().max() / whole.abs().max()).item()


print("transformers", transformers.__version__, "torch", torch.__version__)
wrong = set()
for kind, settings in KINDS.items():
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | settings)
    config.initializer_range = 0.2
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 64, (1, 12))
    with torch.no_grad():
        several, one = difference(model, ids, 8), difference(model, ids, 11)
    print(f"{kind}: four tokens behind a cache {several:.0e}, one token {one:.0e}")
    assert one < 1e-4, kind
    if several > 1e-3:
        wrong.add(kind)
assert wrong == {"mamba", "falcon_mamba", "jamba"}, f"this has changed: {wrong}"
PYTHON
