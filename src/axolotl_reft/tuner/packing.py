"""Bases that do not keep packed samples apart, with or without an adapter.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from axolotl_reft.prompts.batch import sample_starts
from axolotl_reft.tuner.compat import forward_parameters

# Of a config's ``layer_types``: those that carry a state from token to token whatever
# the mask, and those that pool or choose tokens of a whole row. docs/support.md has
# what was measured.
_LAYER_TYPES = {
    "linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba",
    "compressed_sparse_attention", "heavily_compressed_attention",
    "deepseek_sparse_attention", "minimax_m3_sparse", "qwen_sparse_attention",
}  # fmt: skip
# Recurrent models without such a list.
_RECURRENT = {"recurrent_gemma", "rwkv", "xlstm"}
# transformers 5.16 makes their eager and sdpa masks without the position ids.
_MASKS_WITHOUT_POSITIONS = {
    "afmoe", "bert", "bert-generation", "big_bird", "biogpt", "blt", "camembert",
    "data2vec-text", "doge", "electra", "ernie", "falcon", "gpt_oss", "llama4_text",
    "megatron-bert", "moshi", "openai-gpt", "opt", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
}  # fmt: skip


def what_joins_samples(model: PreTrainedModel) -> str:
    """Return which part of a base lets packed samples reach each other, such as ``18 of
    24 layers (linear_attention)``; empty where nothing is known to."""
    config = model.config.get_text_config()
    kind = config.model_type
    types = Counter(getattr(config, "layer_types", None) or ())
    found = sorted(types.keys() & _LAYER_TYPES)
    if found:
        number = sum(types[name] for name in found)
        return f"{number} of {types.total()} layers ({', '.join(found)})"
    if kind in _RECURRENT:
        return f"the recurrent layers ({kind})"
    if "position_ids" not in forward_parameters(model):
        return f"the layers ({kind} has no position_ids)"
    attention = getattr(config, "_attn_implementation", None) or ""
    if kind in _MASKS_WITHOUT_POSITIONS and "flash" not in attention:
        return f"the attention masks ({kind} makes them without position_ids)"
    return ""


def warn_of_packed_samples(joining: str, inputs: Mapping[str, Any]) -> None:
    """Warn if a row holds several samples, where a part of the base joins them."""
    position_ids, mask = inputs["position_ids"], inputs.get("attention_mask")
    # A GPU's kernels reset their state where these say; elsewhere they are ignored.
    if position_ids.is_cuda and inputs.keys() & {"seq_idx", "cu_seq_lens_q"}:
        return
    rows, width = position_ids.shape[-2:]  # one row may stand for all
    starts_BT = sample_starts(inputs, (rows, width))
    assert starts_BT is not None, "there are position ids"
    if isinstance(mask, Tensor) and mask.ndim == 2:
        starts_BT = starts_BT & (mask != 0)  # padding may be at position 0 too
    if (starts_BT.sum(1) > 1).any():
        warnings.warn(
            f"LoReFT: packed samples are not kept apart by {joining} of the base, with "
            "or without an adapter. Give each sample a row of its own, or on a GPU "
            "pass what the base's kernels take (seq_idx, cu_seq_lens_q)",
            UserWarning,
            stacklevel=2,
        )
