"""The shapes of the recipes' bases, and what an adapter on one of them counts.

From the models' own config.json. Built on the meta device, where weights take no room.
"""

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from axolotl_reft import LoreftConfig


def _shape(kind, vocabulary, hidden, within_mlp, layers, heads, pairs, **more):
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": within_mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
        **more,
    }


def _qwen3(hidden, within_mlp, layers, heads, tied):
    more = {"head_dim": 128, "tie_word_embeddings": tied}
    return _shape("qwen3", 151936, hidden, within_mlp, layers, heads, 8, **more)


_LLAMA_3_8B = _shape("llama", 128256, 4096, 14336, 32, 32, 8)
_LLAMA_3_1B = _shape("llama", 128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True)
_LLAMA_3_3B = _shape("llama", 128256, 3072, 8192, 28, 24, 8, tie_word_embeddings=True)
SHAPES = {
    "meta-llama/Llama-2-7b-hf": _shape("llama", 32000, 4096, 11008, 32, 32, 32),
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-70B": _shape("llama", 128256, 8192, 28672, 80, 64, 8),
    "meta-llama/Llama-3.2-1B": _LLAMA_3_1B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3_3B,
    "Qwen/Qwen3-0.6B-Base": _qwen3(1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B-Base": _qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B-Base": _qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B-Base": _qwen3(4096, 12288, 36, 32, False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, False),
    # make_base.py's.
    "examples/tiny-llama/base": _shape("llama", 36, 104, 320, 6, 4, 4),
    # SmolLM2-135M-Instruct.
    "examples/real/smollm2": _shape(
        "llama", 49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True
    ),
    # Gemma 3 270M.
    "examples/real/gemma3": _shape(
        "gemma3_text", 262144, 640, 2048, 18, 4, 1, head_dim=256
    ),
}
# Bits a number in bitsandbytes' NF4 with double quantisation: 4, an 8-bit scale for 64
# numbers, and a 32-bit one for 256 scales (arXiv 2305.14314, section 3).
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def build_on_meta(name: str, reward: bool) -> PreTrainedModel:
    shape = dict(SHAPES[name])
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    if reward:
        shape |= {"num_labels": 1, "pad_token_id": 0}
    with torch.device("meta"):
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        return kind.from_config(config)


def weight_bytes(base: PreTrainedModel, four_bit: bool) -> float:
    """Of the base in bf16; with ``four_bit``, its layers' linear weights in NF4."""
    total = base.num_parameters()
    linear = 0
    if four_bit:
        linear = sum(
            module.weight.numel()
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in name
        )
    return (total - linear) * 2 + linear * NF4_BITS / 8


def count_parameters(
    base: PreTrainedModel, reward: bool, settings: dict[str, object]
) -> tuple[int, int]:
    """Trainable ones, as PEFT counts them, and the base's.

    Args:
        base: from :func:`build_on_meta`.
        reward: the model is a reward model.
        settings: the recipe's.
    """
    total = base.num_parameters()
    task = "SEQ_CLS" if reward else "CAUSAL_LM"
    config: PeftConfig
    if settings["adapter"] == "lora":
        assert settings["lora_target_linear"]
        rank = settings["lora_r"]
        config = LoraConfig(task_type=task, r=rank, target_modules="all-linear")
    else:
        config = LoreftConfig(task_type=task, **settings["loreft"])
    model = get_peft_model(base, config)
    return model.get_nb_trainable_parameters()[0], total
