"""Tiny models with random weights under the names of PEFT's test models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

Settings = dict[str, Any]

SIZES: Settings = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
ENCODER: Settings = SIZES | {"intermediate_size": 32, "type_vocab_size": 2}
DECODER: Settings = SIZES | {"intermediate_size": 32, "num_key_value_heads": 2}
DECODER |= {"head_dim": 4}
# With weights of the usual size, an edit would not change what is generated.
EXPERTS: Settings = DECODER | {"num_local_experts": 2, "initializer_range": 0.5}
EXPERTS |= {"num_experts_per_tok": 1}
GPT: Settings = {"vocab_size": 100, "n_positions": 64, "n_embd": 16, "n_layer": 2}
GPT |= {"n_head": 4, "bos_token_id": 0, "eos_token_id": 0}

# Name on the hub, class, settings of its config.
DECODERS: tuple[tuple[str, str, Settings], ...] = (
    (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "OPTForCausalLM",
        SIZES | {"ffn_dim": 4, "word_embed_proj_dim": 16},
    ),
    ("peft-internal-testing/tiny-random-GPT2LMHeadModel", "GPT2LMHeadModel", GPT),
    (
        "peft-internal-testing/tiny-random-GPTJForCausalLM",
        "GPTJForCausalLM",
        GPT | {"rotary_dim": 4},
    ),
    ("trl-internal-testing/tiny-random-LlamaForCausalLM", "LlamaForCausalLM", DECODER),
    ("peft-internal-testing/tiny-dummy-qwen2", "Qwen2ForCausalLM", DECODER),
    (
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM",
        "Gemma3ForCausalLM",
        DECODER | {"sliding_window": 8},
    ),
    # PEFT has these in other tests, for its other methods.
    (
        "hf-internal-testing/tiny-random-MistralForCausalLM",
        "MistralForCausalLM",
        DECODER,
    ),
    (
        "trl-internal-testing/tiny-Llama4ForCausalLM",
        "Llama4ForCausalLM",
        EXPERTS | {"intermediate_size_mlp": 32},
    ),
    ("trl-internal-testing/tiny-GptOssForCausalLM", "GptOssForCausalLM", EXPERTS),
)
OTHERS: tuple[tuple[str, str, Settings], ...] = (
    ("peft-internal-testing/tiny-random-BertModel", "BertModel", ENCODER),
    ("peft-internal-testing/tiny-random-RobertaModel", "RobertaModel", ENCODER),
    ("peft-internal-testing/tiny-random-DebertaModel", "DebertaModel", ENCODER),
    ("peft-internal-testing/tiny-random-DebertaV2Model", "DebertaV2Model", ENCODER),
    (
        "peft-internal-testing/tiny-random-BertForSequenceClassification",
        "BertForSequenceClassification",
        ENCODER,
    ),
    (
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification",
        "RobertaForSequenceClassification",
        ENCODER,
    ),
    (
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",
        "LlamaForSequenceClassification",
        DECODER | {"pad_token_id": 0},
    ),
)
# A saved LoRA adapter, which the tests of configs read.
ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"


def write_models(folder: Path) -> None:
    """Save each model under its name, where ``from_pretrained`` looks first."""
    for name, class_name, settings in DECODERS + OTHERS:
        model_class = getattr(transformers, class_name)
        torch.manual_seed(0)
        model_class(model_class.config_class(**settings)).save_pretrained(folder / name)
    (folder / ADAPTER).mkdir(parents=True)
    config = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    (folder / ADAPTER / "adapter_config.json").write_text(json.dumps(config))


class CustomModel(transformers.LlamaForTokenClassification):
    """A Llama with the signature of the small networks in PEFT's custom tests.

    It classifies rows by the mean of all tokens, so that each edit counts.
    """

    dtype = torch.float32  # The tests set it.

    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X).logits.mean(1).log_softmax(-1)

    @classmethod
    def from_pretrained(
        cls, model_id: str = "MLP", dtype: torch.dtype = torch.float32
    ) -> CustomModel:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**DECODER)
        config._name_or_path = model_id  # The model takes its name from here.
        return cls(config).to(dtype)
