"""Lists model types whose default config is not enough. This is test data: the library itself knows no model by name.

`DEFAULTS[model_type]`: arguments without which the default config is not whole.
`FIELDS[model_type]`: fields to set after shrinking, wherever a config of that type stands in the tree.
"""

from __future__ import annotations

from typing import Any

#: The rotary sections are a default in the model's code, made for the large head size.
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_MROPE_HEAD16 = {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
_MROPE_PARTIAL = {
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3]}

DEFAULTS: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 4, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 8, "num_local_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
}

FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "qwen2_5_omni_talker"), _MROPE),
    **dict.fromkeys(("glm4v_text", "glm_image_text", "glm_ocr_text"), _MROPE),
    "paddleocr_vl_text": _MROPE_HEAD16,
    "glm4v_moe_text": _MROPE_PARTIAL,
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (32, 32)},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "step3p5": {"sliding_window": 8},
    "swin": {"window_size": 2, "image_size": 64},
    "maskformer-swin": {"window_size": 2, "image_size": 64},
    "donut-swin": {"window_size": 2, "image_size": 64},
    "swinv2": {"window_size": 2, "image_size": 64},
    "clvp_encoder": {"num_attention_heads": 2},  # rotary positions are at least 32 wide
    "clap_audio_model": {"window_size": 4},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "mistral4": {"qk_nope_head_dim": 8, "qk_head_dim": 16, "head_dim": 16},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": _HYBRID, "attention_hidden_size": 128, "attention_head_dim": 16},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": _HYBRID,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 16,
        "mamba_headdim": 16,
        "kv_channels": 8,
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _MROPE["rope_parameters"], "sliding_attention": _MROPE["rope_parameters"]}
    },
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
    "longcat_flash": {"zero_expert_num": 2},
    "perceiver": {"d_latents": 64, "num_latents": 16, "d_model": 64, "num_self_attends_per_block": 2},
    "nemotron": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96, "intermediate_size": 192},
    "bros": {"dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 8},
    "mobilebert": {"intra_bottleneck_size": 64, "true_hidden_size": 64},
    "xmod": {"default_language": "en_XX"},
    "vipllava": {"vision_feature_layers": [-1, -2, 1]},
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "mllama_vision_model": {"vision_output_dim": 192},
    **{name: {"image_token_index": 100} for name in ("blip-2", "instructblip")},
    "instructblipvideo": {"video_token_index": 100},
    **{name: {"mm_tokens_per_image": 4} for name in ("gemma3", "t5gemma2_encoder")},
    **{name: {"out_hidden_size": 256} for name in ("muse_spark", "muse_glimmer")},  # of four patches together
    "hrm_text": {"num_layers_per_stack": 2},
    "timesfm2_5": {"context_length": 128},  # its code goes over each patch of 32
    "llama4_vision_model": {"intermediate_size": 256},
    **{name: {"vision_start_token_id": 100, "vision_end_token_id": 101} for name in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
}
