"""Bases whose layers share keys and values, under gradient checkpointing."""

from functools import partial

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from axolotl_reft import LoreftConfig

LAYERS = 6
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
}
SHARING = {
    "gemma4_text": {"global_head_dim": 8},
    "gemma3n_text": {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * LAYERS},
}
LORA = {"target_modules": ["k_proj", "v_proj"], "init_lora_weights": False}
ADAPTERS = {
    "LoRA": partial(LoraConfig, task_type="CAUSAL_LM", **LORA),
    # A layer of Gemma 3n returns several residual streams.
    "LoReFT": partial(LoreftConfig, task_type="CAUSAL_LM", component="mlp_output"),
}
REENTRANT, NOT = {"use_reentrant": True}, {"use_reentrant": False}


def sharing_base(kind, shared=3):
    torch.manual_seed(0)
    settings = {**SIZES, **SHARING[kind], "num_kv_shared_layers": shared}
    config = AutoConfig.for_model(kind, **settings)
    return AutoModelForCausalLM.from_config(config).train()


def gradients(model, tokens):
    model.zero_grad()
    labels = tokens(2, 12).where(torch.arange(12) >= 6, -100)
    model(tokens(2, 12), labels=labels, use_cache=False).loss.backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def difference(got, expected):
    assert got.keys() == expected.keys()
    return max(
        float((got[name] - grad).norm() / grad.norm())
        for name, grad in expected.items()
        if grad.any()
    )


@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("kind", list(SHARING))
def test_other_checkpointing_is_exact_and_reentrant_is_not(
    kind, adapter, tokens, monkeypatch
):
    refuse = "axolotl_reft.tuner.hooks.refuse_reentrant_checkpointing"
    monkeypatch.setattr(refuse, lambda _: None)
    model = get_peft_model(sharing_base(kind), ADAPTERS[adapter]())
    expected = gradients(model, tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=NOT)
    assert difference(gradients(model, tokens), expected) == 0
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
    assert difference(gradients(model, tokens), expected) > 0.1


@pytest.mark.parametrize("kind", list(SHARING))
@pytest.mark.parametrize("first", ["adapter", "checkpointing"])
def test_reentrant_checkpointing_is_refused(kind, first):
    base, config = sharing_base(kind), LoreftConfig(task_type="CAUSAL_LM")
    message = r"use_reentrant: True: layers of Gemma\w+ share keys and .*: False}$"
    if first == "adapter":
        base = get_peft_model(base, config)
        base.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match=message):
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, config)


@pytest.mark.parametrize("base", [build_model, partial(sharing_base, "gemma4_text", 0)])
def test_other_bases_may_use_it(base):
    model = get_peft_model(base(), LoreftConfig(task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
    unloaded = model.unload()
    assert "gradient_checkpointing_enable" not in vars(unloaded)
