"""The random checkpoint as GGUF, Q8_0 as llama.cpp's own converter writes it: 1-d tensors and the router float32."""

from pathlib import Path

import gguf
import torch
from checkpoint import CONFIG, dense, tensors
from gguf.quants import quantize
from torch import Tensor

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


def write_q8_0(file: Path) -> Path:
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "deepseek2")
    _describe(writer)
    experts: dict[str, list[Tensor]] = {}
    for name, value, scale in tensors():
        weight = dense(value, scale)
        stem, layer = name, ""
        if name.startswith("model.layers."):
            _, _, number, stem = name.split(".", 3)
            layer = f"blk.{number}."
        if stem.startswith("mlp.experts."):
            part = stem.split(".")[3].removesuffix("_proj")
            stacked = experts.setdefault(f"{layer}ffn_{part}_exps.weight", [])
            stacked.append(weight)
            if len(stacked) == CONFIG["n_routed_experts"]:
                _add(writer, f"{layer}ffn_{part}_exps.weight", torch.stack(stacked))
                stacked.clear()
        elif stem == "self_attn.kv_b_proj.weight":
            nope, value_width = CONFIG["qk_nope_head_dim"], CONFIG["v_head_dim"]
            heads = weight.view(CONFIG["num_attention_heads"], nope + value_width, -1)
            _add(writer, layer + "attn_k_b.weight", heads[:, :nope].transpose(1, 2))
            _add(writer, layer + "attn_v_b.weight", heads[:, nope:])
        else:
            _add(writer, layer + NAMES[stem], weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(file)
    return file


def _add(writer: gguf.GGUFWriter, name: str, weight: Tensor) -> None:
    array = weight.contiguous().float().numpy()
    if weight.ndim == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(name, array)
    else:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)


def _describe(writer: gguf.GGUFWriter) -> None:
    c = CONFIG
    latent, rope = c["kv_lora_rank"], c["qk_rope_head_dim"]
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(1)  # the latent, which all heads share
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_rope_dimension_count(rope)
    writer.add_q_lora_rank(c["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(c["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(c["v_head_dim"])
    writer.add_leading_dense_block_count(c["first_k_dense_replace"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_count(c["n_routed_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_shared_count(c["n_shared_experts"])
    writer.add_expert_group_count(c["n_group"])
    writer.add_expert_group_used_count(c["topk_group"])
    writer.add_expert_weights_scale(c["routed_scaling_factor"])
    writer.add_expert_weights_norm(c["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
