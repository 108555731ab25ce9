"""Small random models in transformers, written to disk with the names and the format of published checkpoints.

Weights are scaled up from the default initialisation so that attention is peaked and logits spread: at the default,
attention is nearly uniform and real bugs stay below any tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gemma4_models import GEMMA4_CONFIGS
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from v4_models import V4_CONFIGS, V4_QUANTISED, published_name


class KimiK2Config(DeepseekV3Config):
    """transformers has no class for it: the published directory has code of its own, which is DeepSeek-V3's."""

    model_type = "kimi_k2"


class KimiK25Config(DeepseekV3Config):
    """The text part, which transformers computes as DeepSeek-V3."""

    model_type = "kimi_k25"


FAMILIES = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "deepseek_v4": (DeepseekV4Config, DeepseekV4ForCausalLM),
    "gemma4_text": (Gemma4TextConfig, Gemma4ForCausalLM),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
    "kimi_k2": (KimiK2Config, DeepseekV3ForCausalLM),
    "kimi_k25": (KimiK25Config, DeepseekV3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_5_text": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
}

V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False}

QWEN3 = {**QWEN2, "model_type": "qwen3", "head_dim": 24}
SMOLLM3 = {**LLAMA, "model_type": "smollm3", "num_hidden_layers": 4, "rope_theta": 5e6, "pad_token_id": 0}
QWEN3_5 = {
    **{key: value for key, value in QWEN2.items() if key not in ("rope_theta", "use_sliding_window")},
    **{"model_type": "qwen3_5_text", "num_hidden_layers": 4, "head_dim": 24, "pad_token_id": None},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 20},
    **{"linear_conv_kernel_dim": 4},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}


V3_YARN = {**V3, "rope_scaling": YARN}
V2 = {
    **{key: value for key, value in V3.items() if key not in ("scoring_func", "num_nextn_predict_layers")},
    "model_type": "deepseek_v2",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}
V32 = {**V3_YARN, "model_type": "deepseek_v32", "index_n_heads": 16, "index_head_dim": 32, "index_topk": 24}
GLM = {
    **{key: value for key, value in V3.items() if key not in ("rope_theta", "num_nextn_predict_layers")},
    **{"model_type": "glm_moe_dsa", "n_group": 1, "topk_group": 1, "num_hidden_layers": 4, "rms_norm_eps": 1e-5},
    **{"index_n_heads": 16, "index_head_dim": 32, "index_topk": 24},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
}
KIMI_K2 = {
    **V3,
    **{"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "rope_theta": 50000.0},
    "routed_scaling_factor": 2.827,
    "rope_scaling": {**YARN, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "v3": V3,
    "v3-yarn": V3_YARN,
    "v3-yarn-uneven-mscale": {**V3, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}},
    "v3-drafts": {**V3_YARN, "draft_layer": True},
    "v3-no-q-lora": {**V3_YARN, "q_lora_rank": None},
    "v3-no-groups": {**V3_YARN, "n_group": 1, "topk_group": 1},
    "v3-no-norm": {**V3, "norm_topk_prob": False, "n_shared_experts": 2},
    "v3-bias-tied": {**V3, "attention_bias": True, "tie_word_embeddings": True},
    "v2": V2,
    "v2-lite": {
        **V2,
        "topk_method": "greedy",
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    "v32": V32,
    "v32-many-heads-drafts": {**V32, "index_n_heads": 72, "index_head_dim": 16, "draft_layer": True},
    "v32-dense": {**V32, "index_topk": 90},
    "glm": GLM,
    "glm-shared": {**GLM, "index_topk_freq": 2, "index_skip_topk_offset": 1},
    "glm-pattern-drafts": {**GLM, "index_topk_pattern": "FSSF", "draft_layer": True, "num_nextn_predict_layers": 1},
    "glm-listed-groups": {
        **GLM,
        **{"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "n_shared_experts": 2, "attention_bias": True},
        "indexer_types": ["full", "shared", "full", "shared"],
    },
    "glm-yarn-tied": {
        **GLM,
        "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 1e4},
        "tie_word_embeddings": True,
    },
    **GEMMA4_CONFIGS,
    "kimi-k2": KIMI_K2,
    **V4_CONFIGS,
    "llama-gqa": LLAMA,
    "llama-mha-tied": {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-mqa-biases": {**LLAMA, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {**LLAMA, "head_dim": 24},
    "llama-linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-llama3": {
        **LLAMA,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": QWEN2,
    "qwen2-tied": {**QWEN2, "tie_word_embeddings": True},
    "qwen3": QWEN3,
    "qwen3-mha-tied": {**QWEN3, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3_5": QWEN3_5,
    "qwen3_5-tied-biases": {
        **QWEN3_5,
        **{"layer_types": ["full_attention", "linear_attention"] * 2, "num_key_value_heads": 4, "attention_bias": True},
        **{"tie_word_embeddings": True, "linear_conv_kernel_dim": 3, "linear_num_key_heads": 4},
    },
    "qwen3_5-yarn-wide": {
        **QWEN3_5,
        **{"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "linear_num_key_heads": 1},
        **{"linear_key_head_dim": 128, "linear_value_head_dim": 96, "linear_conv_kernel_dim": 2},
        "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    },
    "smollm3": SMOLLM3,
    "smollm3-every-second": {**SMOLLM3, "no_rope_layer_interval": 2, "num_key_value_heads": 4},
    "smollm3-listed-biases-tied": {
        **SMOLLM3,
        "no_rope_layers": [0, 1, 1, 0, 0, 1],
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "smollm3-all-rotated-yarn": {
        **SMOLLM3,
        "no_rope_layers": [1, 1, 1, 1],
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    },
    "qwen2-yarn": {
        **QWEN2,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    },
}


@dataclass
class Checkpoint:
    """A model directory and the transformers model with the same (dequantised) weights."""

    path: Path
    model: PreTrainedModel
    tensors: dict[str, Tensor] = field(repr=False)

    def logits(self, tokens: list[int]) -> Tensor:
        """[t, vocabulary], float32, from transformers."""
        with torch.inference_mode():
            return self.model(torch.tensor([tokens]), use_cache=False).logits[0]


def build(
    path: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    fp8: bool = False,
    scale_fmt: str | None = None,
    shards: int = 1,
) -> Checkpoint:
    """Write a random model to `path` as it would be published, and keep it in transformers for comparison."""
    path.mkdir(parents=True, exist_ok=True)
    model = _transformers_model(config)
    _scale_weights(model, seed)
    tensors = _published(model, config) | (_draft_layer(model, config, seed) if config.get("draft_layer") else {})
    stored = {}
    for name, tensor in tensors.items():
        if fp8 and _is_quantised(name):
            published = name.endswith(V4_QUANTISED)
            scale = name.removesuffix("weight") + ("scale" if published else "weight_scale_inv")
            stored[name], stored[scale] = quantise(tensor)
            tensors[name] = dequantise(stored[name], stored[scale])
        else:
            stored[name] = tensor
    if fp8:
        _load_published(model, tensors)
        quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        quantization |= {"scale_fmt": scale_fmt} if scale_fmt else {}
        config = {**config, "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    write(path, stored, shards)
    return Checkpoint(path, model, tensors)


def _draft_layer(model: PreTrainedModel, config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """A random multi-token-prediction layer under its published names, copies of embedding and head included."""
    last, at = f"model.layers.{config['num_hidden_layers'] - 1}.", f"model.layers.{config['num_hidden_layers']}."
    generator = torch.Generator().manual_seed(seed + 1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    c, main = config["hidden_size"], _published(model, config)
    norms = {f"{name}.weight": 1 + 0.2 * noise(c) for name in ("enorm", "hnorm", "shared_head.norm")}
    shared = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    layer = {
        name.removeprefix(last): tensor[torch.randperm(len(tensor), generator=generator)]
        for name, tensor in main.items()
        if name.startswith(last)
    }
    layer |= norms | {name: main[of] for name, of in shared.items()}
    layer |= {"eh_proj.weight": noise(c, 2 * c) * (2 * c) ** -0.5}
    return {at + name: tensor for name, tensor in layer.items()}


def write(path: Path, stored: dict[str, Tensor], shards: int = 1) -> None:
    """Save tensors as one file, or as several with an index."""
    stored = {name: tensor.detach().clone().contiguous() for name, tensor in stored.items()}
    if shards == 1:
        save_file(stored, path / "model.safetensors")
        return
    (path / "model.safetensors").unlink(missing_ok=True)  # which would count
    names, weight_map = sorted(stored), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        save_file({name: stored[name] for name in part}, path / file)
        weight_map.update(dict.fromkeys(part, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def quantise(weight_nc: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn codes and float32 scales of 128×128 blocks, block by block."""
    n, c = weight_nc.shape
    codes = torch.empty(n, c, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-n // block), -(-c // block))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[i, j] = weight_nc[at].abs().max() / 448
            codes[at] = (weight_nc[at] / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


def dequantise(codes: Tensor, scale: Tensor, block: int = 128) -> Tensor:
    weight = codes.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            weight[i * block : (i + 1) * block, j * block : (j + 1) * block] *= scale[i, j].float()
    return weight


def _transformers_model(config: dict[str, Any]) -> PreTrainedModel:
    config_class, model_class = FAMILIES[config["model_type"]]
    known = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype", "dtype", "draft_layer")}
    hf_config = config_class(**known)
    hf_config._attn_implementation = "eager"
    return model_class(hf_config).float().eval()


@torch.no_grad()
def _scale_weights(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("inv_freq", "embed_scale")):
            continue
        if name.endswith("tid2eid"):  # experts by token
            tensor.copy_(torch.rand(len(tensor), 16, generator=generator).argsort(1)[:, : tensor.shape[1]])
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "e_score_correction_bias" in name:
            tensor.copy_(0.3 * noise)
        elif "embed_tokens" in name:
            factor = getattr(model.get_submodule(name.rpartition(".")[0]), "scalar_embed_scale", None)
            tensor.copy_(noise if factor is None else 2 * noise / factor)
        elif name.endswith("layer_scalar"):
            tensor.copy_(0.8 + 0.1 * noise)
        elif name.endswith("A_log"):
            tensor.copy_(0.5 * noise - 1.5)  # states that last for some ten tokens
        elif "norm" in name and model.config.model_type.startswith("qwen3_5") and "linear_attn" not in name:
            tensor.copy_(0.2 * noise)
        elif tensor.ndim == 1:
            tensor.copy_(1 + 0.2 * noise if "norm" in name else 0.5 * noise)
        else:
            gain = 2.0 if any(part in name for part in ("q_", "k_proj", "kv_a", "lm_head")) else 1.0
            tensor.copy_(gain * noise * tensor.shape[-1] ** -0.5)


def _published(model: PreTrainedModel, config: dict[str, Any]) -> dict[str, Tensor]:
    """transformers 5 keeps all experts of a layer in one tensor; published checkpoints have three per expert."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                stem = name.removesuffix("gate_up_proj") + f"{expert}."
                tensors[stem + "gate_proj.weight"], tensors[stem + "up_proj.weight"] = gate, up
        elif name.endswith("mlp.experts.down_proj"):
            for expert, down in enumerate(tensor):
                tensors[name.removesuffix("down_proj") + f"{expert}.down_proj.weight"] = down
        elif not (config["tie_word_embeddings"] and name == "lm_head.weight"):
            tensors[name] = tensor
    rename = _renamed(model)
    return {rename(name): tensor.detach().clone() for name, tensor in tensors.items()}


def _renamed(model: PreTrainedModel) -> Callable[[str], str]:
    """transformers' name of a tensor → the published one."""
    return published_name if model.config.model_type == "deepseek_v4" else lambda name: name


@torch.no_grad()
def _load_published(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """The inverse of `_published`: put published tensors back into the transformers model."""
    rename = _renamed(model)
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for expert in range(tensor.shape[0]):
                gate, up = (tensors[rename(f"{stem}{expert}.{part}_proj.weight")] for part in ("gate", "up"))
                tensor[expert].copy_(torch.cat((gate, up)))
        elif name.endswith("mlp.experts.down_proj"):
            for expert in range(tensor.shape[0]):
                tensor[expert].copy_(tensors[rename(f"{name.removesuffix('down_proj')}{expert}.down_proj.weight")])
        elif rename(name) in tensors:
            tensor.copy_(tensors[rename(name)])


def _is_quantised(name: str) -> bool:
    """What DeepSeek publishes in FP8: the projections, not embedding, head, norms or router."""
    kept = ("indexer.weights_proj.weight", "eh_proj.weight")
    quantised = ("_proj.weight", "kv_a_proj_with_mqa.weight", "indexer.wq_b.weight", "indexer.wk.weight")
    return name.endswith((*quantised, *V4_QUANTISED)) and not name.endswith(kept)
