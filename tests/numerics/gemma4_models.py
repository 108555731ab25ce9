"""Small configs of Gemma 4."""

from __future__ import annotations

from typing import Any

SLIDING, WHOLE = "sliding_attention", "full_attention"
GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 300,
    "vocab_size_per_layer_input": 300,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 24,
    "intermediate_size": 80,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "layer_types": [SLIDING, SLIDING, WHOLE, SLIDING, SLIDING, WHOLE],
    "sliding_window": 24,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_parameters": {
        WHOLE: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    },
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
GEMMA4_LARGE = {
    **GEMMA4,
    **{"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
    **{"num_kv_shared_layers": 0, "use_double_wide_mlp": False},
}
GEMMA4_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma4": GEMMA4,
    "gemma4-large": GEMMA4_LARGE,
    "gemma4-default-layers": {
        **{key: value for key, value in GEMMA4.items() if key not in ("layer_types", "rope_parameters")},
        **{"num_hidden_layers": 7, "num_kv_shared_layers": 0, "final_logit_softcapping": None, "attention_bias": True},
        **{"tie_word_embeddings": False, "sliding_window": 5},
    },
    "gemma4-keys-as-values-shared": {
        **GEMMA4,
        **{"attention_k_eq_v": True, "use_double_wide_mlp": False, "num_key_value_heads": 4, "sliding_window": 1},
        "rope_parameters": {
            WHOLE: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e5, "factor": 2.0},
            SLIDING: {"rope_type": "default", "rope_theta": 5e3},
        },
    },
}
