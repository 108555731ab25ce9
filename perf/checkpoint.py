"""The random checkpoint that engines are compared on: DeepSeek-V3's architecture, 1.65 B parameters, no training.

One set of numbers in three forms: FP8 with 128×128 scales and bfloat16 embedding and head (ours), bfloat16
(transformers) and Q8_0 GGUF (llama.cpp). Weights keep activations near unit size, so that no engine meets a case that
real weights would not give it; the router is random, hence balanced.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 16,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def shapes(c: dict[str, Any] = CONFIG) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published names and shapes of a config, in the order of the file."""
    d, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    yield "model.embed_tokens.weight", (c["vocab_size"], d)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (d,)
        yield at + "post_attention_layernorm.weight", (d,)
        if c["q_lora_rank"]:
            yield at + "self_attn.q_a_proj.weight", (c["q_lora_rank"], d)
            yield at + "self_attn.q_a_layernorm.weight", (c["q_lora_rank"],)
            yield at + "self_attn.q_b_proj.weight", (heads * (nope + rope), c["q_lora_rank"])
        else:
            yield at + "self_attn.q_proj.weight", (heads * (nope + rope), d)
        yield at + "self_attn.kv_a_proj_with_mqa.weight", (latent + rope, d)
        yield at + "self_attn.kv_a_layernorm.weight", (latent,)
        yield at + "self_attn.kv_b_proj.weight", (heads * (nope + value), latent)
        yield at + "self_attn.o_proj.weight", (d, heads * value)
        if layer < c["first_k_dense_replace"]:
            mlps = {"mlp.": c["intermediate_size"]}
        else:
            yield at + "mlp.gate.weight", (c["n_routed_experts"], d)
            yield at + "mlp.gate.e_score_correction_bias", (c["n_routed_experts"],)
            mlps = {f"mlp.experts.{i}.": c["moe_intermediate_size"] for i in range(c["n_routed_experts"])}
            mlps["mlp.shared_experts."] = c["moe_intermediate_size"] * c["n_shared_experts"]
        for mlp, width in mlps.items():
            yield at + mlp + "gate_proj.weight", (width, d)
            yield at + mlp + "up_proj.weight", (width, d)
            yield at + mlp + "down_proj.weight", (d, width)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (c["vocab_size"], d)


def is_fp8(name: str) -> bool:
    return name.endswith(("_proj.weight", "_with_mqa.weight"))


def parameters() -> int:
    return sum(torch.Size(shape).numel() for _, shape in shapes())


def active_parameters() -> int:
    """Read for one token: all but the embedding and the experts that were not chosen."""
    expert = 3 * CONFIG["hidden_size"] * CONFIG["moe_intermediate_size"]
    layers = CONFIG["num_hidden_layers"] - CONFIG["first_k_dense_replace"]
    idle = (CONFIG["n_routed_experts"] - CONFIG["num_experts_per_tok"]) * layers * expert
    return parameters() - idle - CONFIG["vocab_size"] * CONFIG["hidden_size"]


def active_bytes() -> int:
    """Bytes of those as we store them: one a parameter, two in the head."""
    return active_parameters() + CONFIG["vocab_size"] * CONFIG["hidden_size"]


def tensors() -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name, values or FP8 codes, scales); the same numbers every time."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes():
        if len(shape) == 1:
            value = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape, dtype=torch.bfloat16)
            yield name, value, None
            continue
        noise = torch.randn(shape, generator=generator)
        if is_fp8(name):
            scale = torch.full((-(-shape[0] // 128), -(-shape[1] // 128)), shape[1] ** -0.5 / 100)
            yield name, (noise * 100).clamp(-448, 448).to(torch.float8_e4m3fn), scale
        else:
            yield name, (noise * (0.02 if "gate" in name else shape[1] ** -0.5)).bfloat16(), None


def dense(codes: Tensor, scale: Tensor | None) -> Tensor:
    """float32 of what is stored; the scales of this checkpoint do not vary within a tensor."""
    return codes.float() if scale is None else codes.float() * scale.flatten()[0]


def _finished(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def write_fp8(directory: Path) -> Path:
    if not _finished(directory):
        directory.mkdir(parents=True, exist_ok=True)
        stored: dict[str, Tensor] = {}
        for name, value, scale in tensors():
            stored[name] = value
            if scale is not None:
                stored[name + "_scale_inv"] = scale
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": FP8}), encoding="utf-8")
    return directory


def write_fp8_with_drafts(directory: Path, fp8: Path) -> Path:
    """The checkpoint of `write_fp8` (in `fp8`, a sibling directory) with a multi-token-prediction layer, its last layer
    once more."""
    if not _finished(directory):
        directory.mkdir(parents=True, exist_ok=True)
        layers, d = CONFIG["num_hidden_layers"], CONFIG["hidden_size"]
        last, at = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
        with safe_open(fp8 / "model.safetensors", framework="pt") as file:
            names = list(file.keys())
            draft = {at + n.removeprefix(last): file.get_tensor(n) for n in names if n.startswith(last)}
        draft |= {at + f"{name}.weight": torch.ones(d, dtype=torch.bfloat16) for name in ("enorm", "hnorm")}
        draft[at + "shared_head.norm.weight"] = torch.ones(d, dtype=torch.bfloat16)
        draft[at + "eh_proj.weight"] = (torch.randn(d, 2 * d) * (2 * d) ** -0.5).bfloat16()
        save_file(draft, directory / "draft.safetensors", metadata={"format": "pt"})
        base = directory / "base.safetensors"  # an index names files of its own directory only
        base.unlink(missing_ok=True)
        base.hardlink_to(fp8 / "model.safetensors")
        weight_map = dict.fromkeys(names, base.name) | dict.fromkeys(draft, "draft.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        config = {**CONFIG, "quantization_config": FP8, "num_nextn_predict_layers": 1}
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def write_bfloat16(directory: Path) -> Path:
    if not _finished(directory):
        directory.mkdir(parents=True, exist_ok=True)
        stored = {
            name: value if name.endswith("bias") else dense(value, scale).bfloat16() for name, value, scale in tensors()
        }
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return directory
