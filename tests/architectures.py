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
"""Those that are proven like at load alone."""
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
