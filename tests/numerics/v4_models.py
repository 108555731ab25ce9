"""Small configs of DeepSeek-V4, and the names of tensors in its published checkpoints, from those of transformers: its
own conversion (conversion_mapping.py) read backwards."""

from __future__ import annotations

import re
from typing import Any

V4: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 300,
    "hidden_size": 64,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 48,
    "o_groups": 2,
    "o_lora_rank": 32,
    "sliding_window": 10,
    "compress_ratios": [0, 4, 128, 4, 0],  # the last one is of the layer that drafts
    "compress_rate_hca": 8,
    "compress_rope_theta": 160000,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 64,
    },
    "index_n_heads": 8,
    "index_head_dim": 16,
    "index_topk": 6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 4,
    "hc_eps": 1e-6,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "num_hash_layers": 2,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 1.5,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
V4_CONFIGS: dict[str, dict[str, Any]] = {
    "v4": V4,
    "v4-heavy-tied": {
        **V4,
        **{"compress_ratios": [128, 128, 4], "num_hidden_layers": 3, "compress_rate_hca": 16, "compress_rate_csa": 3},
        **{"hc_mult": 2, "hc_sinkhorn_iters": 1, "scoring_func": "sigmoid", "num_hash_layers": 0, "index_topk": 40},
        **{"o_groups": 4, "sliding_window": 33, "tie_word_embeddings": True, "rope_scaling": None},
    },
    "v4-windows-by-token": {
        **V4,
        **{"compress_ratios": [0, 0], "num_hidden_layers": 2, "num_hash_layers": 5, "sliding_window": 1},
        **{"qk_rope_head_dim": 24, "index_head_dim": 24},
    },
}
V4_QUANTISED = tuple(  # what is published in FP8, with scales named `.scale`
    f".{name}.weight" for name in ("wq_a", "wq_b", "attn.wkv", "wo_a", "wo_b", "w1", "w2", "w3")
)

# Applied in order to a name of transformers, `model.` removed.
_RULES = (
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.attn_hc\.", ".hc_attn_"),
    (r"\.ffn_hc\.", ".hc_ffn_"),
    (r"\.compressor\.indexer\.(kv_proj|gate_proj|kv_norm|position_bias)", r".indexer.compressor.\1"),
    (r"\.compressor\.indexer\.scorer\.weights_proj\.", ".indexer.weights_proj."),
    (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
    (r"compressor\.kv_norm\.", "compressor.norm."),
    (r"\.position_bias$", ".ape"),
    (r"\.sinks$", ".attn_sink"),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.(q_a|q_b|o_a|o_b)_proj\.", r".w\1."),
    (r"\.kv_proj\.", ".wkv."),
    (r"compressor\.gate_proj\.", "compressor.wgate."),
    (r"\.e_score_correction_bias$", ".bias"),
    (r"\.gate_proj\.", ".w1."),
    (r"\.down_proj\.", ".w2."),
    (r"\.up_proj\.", ".w3."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
)


def published_name(name: str) -> str:
    """`model.layers.0.self_attn.q_a_proj.weight` → `layers.0.attn.wq_a.weight`."""
    name = name.removeprefix("model.")
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name
