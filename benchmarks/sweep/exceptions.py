"""Settings of architectures whose config the rules of ``building.py`` do not fit."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BOTH_ROPES = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_ATTENTION_THIRD = ["mamba", "attention", "mamba", "attention"]
_SPARSE = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
    "ple_embed_dim": 64,
    "ngram_vocab_size_base": 200,
}
_QUERIES = {"num_query_tokens": 4, "image_token_index": 150}
_PINPOINTS = {"image_grid_pinpoints": [[32, 32]]}
_VOCABULARY_MAP = {"<image>": 100, "IMGIMGAZ": 101}
_ZAMBA = {
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
}
_REFORMER = {"axial_pos_embds": False, "hash_seed": 0}
_BIG_BIRD = {"block_size": 4, "num_random_blocks": 1}


def _sections(*sizes: int) -> dict[str, Any]:
    """Return parts of the rotary dimension for time, height and width."""
    return {"text_config": {"rope_parameters": _ROPE | {"mrope_section": list(sizes)}}}


# By model class, what its config cannot be made without, and is shrunk as the rest.
NEEDED: dict[str, dict[str, Any]] = {
    "DiffusionGemmaForBlockDiffusion": {
        "vision_config": {"model_type": "gemma4_vision"}
    },
    "Gemma4AssistantForCausalLM": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
        }
    },
    "Gemma4UnifiedAssistantForCausalLM": {
        "text_config": {"model_type": "gemma4_unified_text"}
    },
    "VisionEncoderDecoderModel": {
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "gpt2"},
    },
}
# By model class; an ellipsis leaves a setting out, so that the config derives it.
CHANGES: dict[str, dict[str, Any]] = {
    "AriaForConditionalGeneration": {
        "projector_patch_to_query_dict": {16: 4},
        "max_value_projector_patch_to_query_dict": 4,
    },
    "Blip2ForConditionalGeneration": _QUERIES,
    "InstructBlipForConditionalGeneration": _QUERIES,
    "InstructBlipVideoForConditionalGeneration": {
        "num_query_tokens": 4,
        "video_token_index": 150,
    },
    "Kosmos2ForConditionalGeneration": {"latent_query_num": 4},
    "Exaone4_5_ForConditionalGeneration": {"vision_config": {"window_size": 32}},
    "GlmAsrForConditionalGeneration": {"audio_config": {"intermediate_size": 256}},
    "VoxtralForConditionalGeneration": {
        "audio_token_id": 150,
        "audio_config": {"intermediate_size": 256},
    },
    "LlavaNextForConditionalGeneration": _PINPOINTS,
    "LlavaNextVideoForConditionalGeneration": _PINPOINTS,
    "LlavaOnevisionForConditionalGeneration": _PINPOINTS,
    "VipLlavaForConditionalGeneration": {"vision_feature_layers": [-2, -3]},
    "ChameleonForConditionalGeneration": {"vocabulary_map": _VOCABULARY_MAP},
    "Cosmos3EdgeForConditionalGeneration": {
        "text_config": {"rope_parameters": {"mrope_section": [4, 2, 2]}}
    },
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"] * 2}
    },
    "DiffusionGemmaForBlockDiffusion": {
        "text_config": {
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        }
    },
    "Emu3ForConditionalGeneration": {"vocabulary_map": _VOCABULARY_MAP},
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}}
    },
    "EsmForMaskedLM": {"vocab_size": 160, "mask_token_id": 100, "pad_token_id": 0},
    "EsmcForMaskedLM": {"num_key_value_heads": 4, "vocab_size": 160},
    "Glm5NextForConditionalGeneration": {
        "text_config": {
            "num_key_value_heads": 4,
            "qk_head_dim": 16,
            "index_kpool": 3,
        }
    },
    "Granite4VisionForConditionalGeneration": {
        "text_config": {
            "model_type": "granite",
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 0.25,
        },
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[1, 1]],
    },
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "PerceiverForMaskedLM": {"num_blocks": 1},
    "MobileBertForMaskedLM": {"normalization_type": "layer_norm"},
    "MobileBertModel": {"normalization_type": "layer_norm"},
    "Step3p7ForConditionalGeneration": {"text_config": {"sliding_window": 8}},
    "Qwen2VLForConditionalGeneration": _sections(3, 3, 2),
    "Qwen2_5_VLForConditionalGeneration": _sections(3, 3, 2)
    | {"vision_config": {"window_size": 32}},
    "PaddleOCRVLForConditionalGeneration": _sections(3, 3, 2),
    "Glm4vForConditionalGeneration": _sections(2, 3, 3),
    "Glm46VForConditionalGeneration": _sections(2, 3, 3),
    "GlmOcrForConditionalGeneration": _sections(2, 3, 3),
    "Glm4vMoeForConditionalGeneration": _sections(2, 1, 1),
    "Qwen2_5OmniThinkerForConditionalGeneration": {"vision_start_token_id": 150}
    | _sections(3, 3, 2),
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"vision_start_token_id": 150}
    | _sections(3, 3, 2),
    "Mistral4ForCausalLM": {"head_dim": 32},
    "MllamaTextModel": {"cross_attention_layers": []},
    "xLSTMForCausalLM": {"chunk_size": 16, "qk_dim_factor": 1.0},
    "HunYuanVLForConditionalGeneration": _sections(2, 2, 2, 2),
    "HrmTextForCausalLM": {"num_hidden_layers": ...},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 100},
    "GraniteSpeechForConditionalGeneration": {
        "encoder_config": {"hidden_dim": 64, "context_size": 16},
        "window_size": 10,
    },
    "GraniteSpeechPlusForConditionalGeneration": {
        "encoder_config": {"hidden_dim": 64, "context_size": 16},
        "window_size": 10,
    },
    "KyutaiSpeechToTextForConditionalGeneration": {
        "codec_config": {"upsample_groups": 64, "num_filters": 4}
    },
    "MiniMaxM3SparseForConditionalGeneration": {
        "merged_hidden_size": 256,
        "projector_hidden_size": 64,
    },
    "Qwen2_5OmniForConditionalGeneration": {"enable_audio_output": False},
    "VibeVoiceAsrForConditionalGeneration": {
        "acoustic_tokenizer_encoder_config": {"num_filters": 1},
        "semantic_tokenizer_encoder_config": {"num_filters": 1},
    },
    "Florence2ForConditionalGeneration": {
        "vision_config": {"embed_dim": [16, 32, 64, 64]}
    },
    "ZambaForCausalLM": _ZAMBA,
    "Zamba2ForCausalLM": _ZAMBA
    | {
        "mamba_headdim": 32,
        "hybrid_layer_ids": [1, 3],
    },
    "Qwen3OmniMoeForConditionalGeneration": {"enable_audio_output": False},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "XmodForMaskedLM": {"default_language": "en_XX"},
    "JambaForCausalLM": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "MllamaForCausalLM": {"cross_attention_layers": []},
    "MllamaForConditionalGeneration": {"text_config": {"cross_attention_layers": [1]}},
    "BambaForCausalLM": {"attn_layer_indices": [1, 3]},
    "BigBirdForCausalLM": _BIG_BIRD,
    "BigBirdForMaskedLM": _BIG_BIRD,
    "BigBirdModel": _BIG_BIRD,
    "BigBirdPegasusForCausalLM": _BIG_BIRD,
    "CohereCompassForCausalLM": {"rope_parameters": _BOTH_ROPES},
    "CohereCompassForConditionalGeneration": {
        "text_config": {"rope_parameters": _BOTH_ROPES}
    },
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "GraniteMoeHybridForCausalLM": {"layer_types": _ATTENTION_THIRD},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "Qwen4ExpForCausalLM": _SPARSE,
    "Qwen4ExpForConditionalGeneration": {"text_config": _SPARSE},
    "ReformerModelWithLMHead": _REFORMER,
    "ReformerForMaskedLM": _REFORMER,
    "ReformerModel": _REFORMER,
}
