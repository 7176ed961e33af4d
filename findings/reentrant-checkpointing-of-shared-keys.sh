#!/usr/bin/env bash
# One would guess: gradient checkpointing changes memory and time, and no gradient.
#
# What happens: layers of Gemma 4 and Gemma 3n that share the keys and values of an
# earlier layer get them outside of their inputs. Reentrant checkpointing computes a
# layer without gradients first, so what the later layers would send back to the shared
# keys and values is lost: the gradients of k_proj and v_proj are other ones. Nothing is
# said. Non-reentrant checkpointing gives the gradients of no checkpointing, bit for bit.
#
# Version: transformers 5.16.1, torch 2.13.0 (CPU), Python 3.11.
# Source: running this.
#
# Met in: comparing gradients of adapters under both kinds of checkpointing.
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
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
KINDS = {
    "gemma4_text": {"global_head_dim": 8},
    "gemma3n_text": {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 6},
}


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if ("k_proj" in name or "v_proj" in name) and p.grad is not None
    }


def difference(got, expected):
    """The largest, relative to a gradient's norm."""
    return max(
        float((got[name] - grad).norm() / grad.norm())
        for name, grad in expected.items()
        if grad.any()
    )


print("transformers", transformers.__version__, "torch", torch.__version__)
for kind, settings in KINDS.items():
    for shared in (0, 3):
        torch.manual_seed(0)
        settings = SIZES | settings | {"num_kv_shared_layers": shared}
        config = AutoConfig.for_model(kind, **settings)
        model = AutoModelForCausalLM.from_config(config).train()
        ids = torch.randint(3, 64, (2, 12))
        expected, found = gradients(model, ids), {}
        model.enable_input_require_grads()
        for reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            found[reentrant] = difference(gradients(model, ids), expected)
        print(
            f"{kind}, {shared} layers share: reentrant {found[True]:.1e},",
            f"non-reentrant {found[False]:.1e}",
        )
        assert found[False] == 0, "this has changed"
        assert (found[True] > 0.1) == bool(shared), "this has changed"
PYTHON
