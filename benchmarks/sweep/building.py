"""Tiny random models, shrunk from the default settings of their config classes."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.sweep.architectures import Architecture, config_class
from benchmarks.sweep.exceptions import CHANGES, NEEDED

LAYERS = 4
HIDDEN = 64
VOCABULARY = 160
# Ids below it are ordinary text; ids of images, audio and so on come after.
FIRST_SPECIAL = 100
_LARGEST = 20_000_000

_SIZES: list[tuple[str, int]] = [
    (r"(num_hidden|num|n|encoder|decoder|conf_num_hidden|num_global|aligner_num_add"
     r"|num_encoder|num_decoder)_layers?|n_layer|depth|layers|resampler_depth"
     r"|num_layers_per_stack|num_blocks", LAYERS),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_top_?k|top_k|num_experts_per_token|topk_group"
     r"|n_group|num_shared_experts|n_shared_experts|moe_num_shared_experts", 2),
    (r"zero_expert_num", 2),
    (r"(num_key_value|num_kv|kv_n|swa_num_key_value|num_global_key_value|linear_num_key"
     r"|linear_num)_heads", 2),
    (r"(\w+_)?num_attention_heads|attention_heads|n_heads?|num_heads|\w+_attention_heads"
     r"|index_n_heads|linear_num_value_heads|resampler_(n_)?heads|n_mamba_heads"
     r"|num_(self|cross)_attention_heads|num_attn_heads", 4),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_?dim", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim", 16),
    (r"rotary_dim", 8),
    (r"qk_head_dim", 32),
    (r"head_dim|d_head|d_kv|kv_channels|attention_head_(dim|size)|global_head_dim"
     r"|(\w+_)?head_dim|resampler_dim_head|dim_head", 16),
    (r"[qkvo]{1,2}_lora_rank|laurel_rank|gated_norm_rank|adapter_rank", 16),
    (r"(\w+_)?intermediate_size(_mlp)?|ffn_dim|\w+_ffn_dim|d_ff|dff|dim_ff|n_inner"
     r"|d_inner|ffn_hidden_size|expert_ffn_hidden_size|mlp_dim|feed_forward_size"
     r"|share_expert_dim", 96),
    (r"(true_|text_|vision_|out_|router_|encoder_|decoder_|attention_|pooler_|lru_width"
     r"|backbone_|thinker_|projection_|downsample_|cross_attention_|image_text_"
     r"|patch_embed_)*hidden_size(_global)?|d_model|n_embd|(\w+_)?embed_dim|dim"
     r"|emb_dim|embedding_(size|dim)|word_embed_proj_dim|\w+_embedding_size"
     r"|projection_dim|lru_width|d_latents|entity_emb_size|output_dim|proj_\w*dim"
     r"|intra_bottleneck_size|hidden_size_per_layer_input|projector_(in|out)put_dim"
     r"|vision_output_dim", HIDDEN),
    (r"(\w+_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"sliding_window|local_attention|attention_window(_size)?|window_size"
     r"|attention_chunk_size|sliding_window_size", 8),
    (r"chunk_size|mamba_chunk_size|block_size|index_block_size"
     r"|\w+_attn_chunk_length", 8),
    (r"mamba_d_state|state_size|ssm_state_size", 16),
    (r"num_landmarks|segment_means_seq_len", 4),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions"
     r"|context_length|max_source_positions", 128),
    (r"image_size|resolution", 32),
    (r"patch_size", 8),
    (r"mm_tokens_per_image", 4),
    (r"base_channels|latent_channels|enc_channels", 32),
    (r"num_kv_shared_layers", 2),
    (r"index_topk", 6),
]  # fmt: skip
_TOKEN = re.compile(
    r"(\w+_)?(token|index)(_id|_index)?|\w+_(bos|eos|bot|eot)_id|im_\w+_id"
)
_LEFT_OUT = {"transformers_version", "architectures", "label2id", "id2label"}
_LEFT_OUT |= {"per_layer_config"}
_FILLED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_FILLED |= {"head_dim": 16}
_ORDINARY = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ORDINARY |= {"decoder_start_token_id": 1, "cls_token_id": 1, "sep_token_id": 2}


def build(architecture: Architecture, seed: int = 0) -> PreTrainedModel:
    """Return the model in eval mode; the same weights each time."""
    torch.manual_seed(seed)
    model_class = getattr(transformers, architecture.model_class)
    config = small_config(architecture)
    with torch.device("meta"):
        sizes = {n: p.numel() for n, p in model_class(config).named_parameters()}
    if sum(sizes.values()) > _LARGEST:
        most = max(sizes, key=sizes.__getitem__)
        raise ValueError(f"still {sum(sizes.values()):,} parameters, as in {most}")
    model = model_class(small_config(architecture)).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        # Away from zeros and ones, so that everything has an effect.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def small_config(architecture: Architecture) -> PretrainedConfig:
    """Return the config with everything that costs made small."""
    found = config_class(architecture)
    name = architecture.model_class
    settings = found(**copy.deepcopy(NEEDED.get(name, {}))).to_dict()
    small = _Shrinking().settings(settings)
    made = found(**_merged(small, copy.deepcopy(CHANGES.get(name, {}))))
    if architecture.kind == "causal" and hasattr(made, "is_decoder"):
        made.is_decoder = True
    return made


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            _merged(settings[key], value)
        elif value is Ellipsis:
            settings.pop(key, None)
        else:
            settings[key] = value
    return settings


class _Shrinking:
    """Makes the settings of a config and of those within it small."""

    def __init__(self) -> None:
        self._special: dict[int, int] = {}

    def settings(self, given: dict[str, Any]) -> dict[str, Any]:
        layers, plain = _layers_of(given), PretrainedConfig().to_dict()
        small = {}
        for key, value in given.items():
            if key in _LEFT_OUT or (key in plain and plain[key] == value):
                continue
            small[key] = self._value(str(key), value, layers)
        if "kv_lora_rank" in small:
            small["num_key_value_heads"] = small["num_attention_heads"]
        return small

    def _value(self, key: str, value: Any, layers: int) -> Any:
        if isinstance(value, dict):
            if key in ("rope_parameters", "rope_scaling"):
                return value
            return self.settings(value)
        if isinstance(value, list):
            return self._list(key, value, layers)
        if isinstance(value, bool) or value is None:
            return _FILLED.get(key) if value is None else value
        if isinstance(value, float) or value == 0:
            if re.search("dropout|layerdrop|drop_path|pdrop|attn_drop", key):
                return type(value)(0)
            return 0.2 if key in ("initializer_range", "init_std") else value
        if isinstance(value, int):
            return self._number(key, value)
        return value

    def _number(self, key: str, value: int) -> int:
        if key in _ORDINARY:
            return _ORDINARY[key]
        if _TOKEN.fullmatch(key) and value > 8:
            return self._special.setdefault(value, FIRST_SPECIAL + len(self._special))
        for pattern, size in _SIZES:
            if re.fullmatch(pattern, key):
                return size if value > size or size == LAYERS and value > 0 else value
        return value

    def _list(self, key: str, value: list[Any], layers: int) -> list[Any]:
        if len(value) == layers and layers > LAYERS:
            distinct = list(dict.fromkeys(map(_hashable, value)))
            if value == list(range(layers)):
                return list(range(LAYERS))
            kinds = [self._value(key, _plain(kind), layers) for kind in distinct]
            return [kinds[n % len(kinds)] for n in range(LAYERS)]
        if re.search("layer|idx|ind(ex|ices)|ids", key) and all(
            isinstance(v, int) and not isinstance(v, bool) and v < layers for v in value
        ):
            if key.endswith("token_ids"):
                return [self._number("token_id", v) for v in value]
            kept = [v * LAYERS // layers if v >= 0 else max(v, -LAYERS) for v in value]
            return list(dict.fromkeys(kept))
        if key == "eos_token_id":
            return [2]
        return value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _layers_of(settings: dict[str, Any]) -> int:
    for key, value in settings.items():
        if re.fullmatch(_SIZES[0][0], str(key)) and isinstance(value, int):
            return max(value, LAYERS)
    return LAYERS
