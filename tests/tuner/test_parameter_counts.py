"""The paper's parameter counts, at its models' shapes, on the meta device.

Percentages of arXiv 2404.03592: Table 1 (commonsense), section 4.3 and Table 3
(instruction following), Table 4 (GLUE, without the classifier's head).
"""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from axolotl_reft import LoreftConfig

LLAMA = {"model_type": "llama", "vocab_size": 32000}
SHAPES = {
    "LLaMA-7B": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "LLaMA-13B": LLAMA
    | {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "Llama-3-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "RoBERTa-base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "RoBERTa-large": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}
SHAPES["Llama-2-7B"] = SHAPES["LLaMA-7B"]
FOUR_LAYERS = {"layers": [3, 9, 18, 24], "rank": 4, "tied_weights": False}
PREFIX = {"rank": 1, "positions": "f1", "task_type": "SEQ_CLS"}


@pytest.mark.parametrize(
    ("shape", "settings", "count", "percent"),
    [
        ("LLaMA-7B", {"rank": 8}, 2_097_408, "0.031"),
        ("LLaMA-13B", {"rank": 8}, 3_277_120, "0.025"),
        ("Llama-3-8B", {"rank": 8}, 2_097_408, "0.026"),
        ("Llama-2-7B", FOUR_LAYERS, 262_176, "0.0039"),
        ("RoBERTa-base", PREFIX, 18_444, "0.015"),
        ("RoBERTa-large", PREFIX, 49_176, "0.014"),
    ],
)
def test_the_papers_counts_and_percentages(shape, settings, count, percent):
    kind = AutoModelForCausalLM
    if "task_type" in settings:
        kind = AutoModelForSequenceClassification
    config = dict(SHAPES[shape])
    with torch.device("meta"):
        base = kind.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config)
        )
    total = base.num_parameters()
    model = get_peft_model(base, LoreftConfig(**settings))
    adapter = sum(p.numel() for name, p in model.named_parameters() if ".intv_" in name)
    assert adapter == count
    assert f"{100 * adapter / total:.{len(percent) - 2}f}" == percent
