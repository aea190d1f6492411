"""Tiny configs of causal language models, one for every kind of architecture that is proven."""

from __future__ import annotations

from typing import Any

DIMENSIONS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"sliding_window": 6}),
    "gemma": ("gemma", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
}
"""Those that every test of passes over rows is run on."""
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_interleave": True,
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "gpt_oss": (
        "gpt_oss",
        {
            **_EXPERTS,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 16,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": 6}),
    "gpt_neox": ("gpt_neox", {}),
    "deepseek_v2": ("deepseek_v2", {**_EXPERTS, **_LATENT, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", {**_EXPERTS, **_LATENT}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", {**_EXPERTS, **_LATENT, "head_dim": 8, "num_key_value_heads": 2}),
    "granite": (
        "granite",
        {
            "logits_scaling": 4.0,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
        },
    ),
    "granitemoe": (
        "granitemoe",
        {
            **_EXPERTS,
            "logits_scaling": 4.0,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
        },
    ),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": (
        "cohere2",
        {
            "logit_scale": 0.25,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmoe": ("olmoe", _EXPERTS),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", {"sliding_window": 6}),
    "stablelm": ("stablelm", {}),
    "nemotron": ("nemotron", {}),
    "exaone4": (
        "exaone4",
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "ministral3": ("ministral3", {"sliding_window": 6}),
    "minimax_m2": ("minimax_m2", _EXPERTS),
    "llama4": (
        "llama4_text",
        {
            **_EXPERTS,
            "attention_chunk_size": 6,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 64,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    "ernie4_5": ("ernie4_5", {}),
    "seed_oss": ("seed_oss", {}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "dots1": ("dots1", {**_EXPERTS, **_LATENT, "head_dim": 8, "num_key_value_heads": 2}),
    "falcon": ("falcon", {"head_dim": None}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "phimoe": ("phimoe", {**_EXPERTS, "sliding_window": 6}),
}
"""Those that are proven as at load alone."""
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
}
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": (
        "qwen3_next",
        {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    ),
    "qwen3_5": ("qwen3_5_text", _DELTA),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 24},
    ),
    "olmo_hybrid": ("olmo_hybrid", _DELTA),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_d_conv": 3,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba": ("bamba", {**_MAMBA, "attn_layer_indices": [1]}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_EXPERTS,
            **_MAMBA,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_intermediate_size": 24,
            "logits_scaling": 4.0,
        },
    ),
    "falcon_h1": ("falcon_h1", {**_MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "conv_kernel": 3,
            "chunk_size": 4,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "lfm2_moe": (
        "lfm2_moe",
        {
            **_EXPERTS,
            "layer_types": ["conv", "full_attention"],
            "conv_L_cache": 3,
            "num_dense_layers": 1,
        },
    ),
    "bailing_hybrid": ("bailing_hybrid", {**_EXPERTS, **_LATENT, **_DELTA}),
    "kimi_linear": ("kimi_linear", {**_EXPERTS, **_LATENT, **_DELTA}),
}
"""Those with layers that keep a state in place of keys and values."""
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "gpt_neo": (
        "gpt_neo",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
        },
    ),
}
"""Those whose positions depend on how many tokens were read."""
_VISION = {"image_size": 12, "patch_size": 4, "num_channels": 3}
SEEING: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "text_config": {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 2],
                },
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": 120,
            "video_token_id": 121,
            "vision_start_token_id": 122,
            "vision_end_token_id": 123,
        },
    ),
    "gemma3_vision": (
        "gemma3",
        {
            "text_config": {
                "sliding_window": 6,
                "query_pre_attn_scalar": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {
                **_VISION,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
            },
            "mm_tokens_per_image": 4,
            "image_token_id": 120,
            "image_token_index": 120,
            "boi_token_index": 122,
            "eoi_token_index": 123,
        },
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            "text_config": {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 1, 1],
                },
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": 120,
            "video_token_id": 121,
            "vision_start_token_id": 122,
            "vision_end_token_id": 123,
        },
    ),
}
"""Those that read images; dimensions are their text decoder's."""
