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
_VOCABULARY_MAP = {"<image>": 100, "IMGIMGAZ": 101}
_ZAMBA = {
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
}
_REFORMER = {"axial_pos_embds": False, "hash_seed": 0}
_BIG_BIRD = {"block_size": 4, "num_random_blocks": 1}

# By model class; an ellipsis leaves a setting out, so that the config derives it.
CHANGES: dict[str, dict[str, Any]] = {
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
    "HrmTextForCausalLM": {"num_hidden_layers": ...},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10000.0}},
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 100},
    "GraniteSpeechForConditionalGeneration": {"encoder_config": {"hidden_dim": 64}},
    "GraniteSpeechPlusForConditionalGeneration": {"encoder_config": {"hidden_dim": 64}},
    "KyutaiSpeechToTextForConditionalGeneration": {
        "codec_config": {"upsample_groups": 64}
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
    "Zamba2ForCausalLM": _ZAMBA | {"mamba_headdim": 16, "hybrid_layer_ids": [1, 3]},
    "Qwen3OmniMoeForConditionalGeneration": {"enable_audio_output": False},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "XmodForMaskedLM": {"default_language": "en_XX"},
    "JambaForCausalLM": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "MllamaForCausalLM": {"cross_attention_layers": []},
    "MllamaForConditionalGeneration": {"text_config": {"cross_attention_layers": [1]}},
    "BambaForCausalLM": {"attn_layer_indices": [1, 3]},
    # Its encoder has other layers than its decoder.
    "BlenderbotForCausalLM": {"encoder_layers": 2},
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
