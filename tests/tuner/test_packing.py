"""Bases that join packed samples: what is said is what they do, by themselves too."""

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from conftest import VOCABULARY, build_model
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from axolotl_reft import LoreftConfig
from axolotl_reft.tuner.packing import what_joins_samples

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
MAMBA = {"mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_expand": 2}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
JOINING = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bloom": {"n_layer": 2, "n_head": 4},
    "deepseek_v32": {
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
        **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_head_dim"), 16),
        **{"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1},
        **{"topk_group": 1, "moe_intermediate_size": 16, "index_topk": 4},
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "falcon_mamba": {"state_size": 8},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "zamba2": {**MAMBA, "n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid"]},
}
APART = ("llama", "gemma3_text", "qwen3_moe", "mistral")
A, B = 9, 12  # tokens of the two samples


def joining_base(kind):
    if kind in APART:
        return build_model(kind)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | JOINING[kind])
    return AutoModelForCausalLM.from_config(config).eval()


def packed(tokens):
    positions = torch.cat([torch.arange(A), torch.arange(B)])[None]
    return {"input_ids": tokens(1, A + B), "position_ids": positions}


def told(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "not kept apart" in str(w.message)]


@pytest.mark.parametrize("kind", [*JOINING, *APART])
@torch.no_grad()
def test_what_is_said_of_a_base_is_what_it_does(kind, tokens):
    base, batch = joining_base(kind), packed(tokens)
    alone = {"input_ids": batch["input_ids"][:, A:]}
    expected = base(**alone, use_cache=False).logits
    got = base(**batch, use_cache=False).logits[:, A:]
    leak = (got - expected).abs().max() / expected.abs().max()
    joining = what_joins_samples(base)
    assert leak > 1e-3 if joining else leak < 1e-5
    # transformers 5.24 keeps samples apart there.
    assert bool(joining) == (kind in JOINING) or kind == "deepseek_v32"
    model = get_peft_model(base, LoreftConfig(task_type="CAUSAL_LM")).eval()
    messages = told(lambda: model(**batch, use_cache=False))
    assert len(messages) == bool(joining)
    assert not joining or f"not kept apart by {joining} of the base" in messages[0]
    assert not told(lambda: model(**batch, use_cache=False))


def test_every_base_that_transformers_calls_stateful_is_known():
    models = Path(transformers.__file__).parent / "models"
    known = []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        folder = models / model_type_to_module_name(kind)
        if any(
            "_is_stateful = True" in f.read_text() for f in folder.glob("model*.py")
        ):
            known.append(kind)
            base = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(kind))]
            with torch.device("meta"):
                config = AutoConfig.for_model(kind)
                base = type("Base", (), {"config": config, "forward": base.forward})
            assert what_joins_samples(base), kind
    assert len(known) > 15


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"position_ids": [[0, 1, 2, 3, 0, 1]]}, True),
        ({"position_ids": [[0, 1, 2, 3, 0, 1]], "attention_mask": [[1] * 6]}, True),
        ({"position_ids": [[0, 1, 2, 3, 4, 5]]}, False),
        ({"attention_mask": [[0, 0, 1, 1, 1, 1]]}, False),
        ({"position_ids": [[1, 1, 0, 1, 2, 3]], "attention_mask": [[0, 0, 1, 1, 1, 1]]},
         False),
        ({"position_ids": [[0, 1, 2, 3, 0, 0]], "attention_mask": [[1, 1, 1, 1, 0, 0]]},
         False),
    ],
)  # fmt: skip
@torch.no_grad()
def test_only_packed_rows_are_warned_of(batch, says, tokens):
    model = get_peft_model(joining_base("lfm2"), LoreftConfig(positions="all")).eval()
    batch = {key: torch.tensor(rows) for key, rows in batch.items()}
    assert bool(told(lambda: model(tokens(1, 6), **batch))) == says


def test_generation_is_not_taken_for_packed(tokens):
    """Nor for the batch that is looked at."""
    model = get_peft_model(joining_base("lfm2"), LoreftConfig(task_type="CAUSAL_LM"))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    settings = {"max_new_tokens": 2, "pad_token_id": 0}
    ids = tokens(1, 6)
    assert not told(lambda: model.generate(ids, attention_mask=mask, **settings))
    assert told(lambda: model.eval()(**packed(tokens), use_cache=False))


def test_flash_attention_is_told_by_position_ids():
    model = joining_base("gpt_oss")
    model.config._attn_implementation_internal = "flash_attention_2"
    assert not what_joins_samples(model)
