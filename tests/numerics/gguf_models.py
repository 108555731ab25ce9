"""Small models with random weights as GGUF files, written by the gguf package as llama.cpp's converter writes them, and
what transformers makes of the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

Type = gguf.GGMLQuantizationType
CONFIGS: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SHAPE = {
    "hidden_size": 256,  # K types have blocks of 256 columns
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 2.0**-17,
}
END, START, TEMPLATE = "<|im_end|>", "<|im_start|>", "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
K_BLOCKS = {Type.Q4_K: (144, 4e-4, (0, 2)), Type.Q5_K: (176, 2e-4, (0, 2)), Type.Q6_K: (210, 3e-5, (208,))}


@dataclass(frozen=True)
class Written:
    """A GGUF file, and the tensors that transformers should have of it, in bfloat16."""

    path: Path
    tensors: dict[str, Tensor]
    config: PretrainedConfig

    def model(self) -> PreTrainedModel:
        """The model in float32."""
        model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        state = {name: tensor.float() for name, tensor in self.tensors.items()}
        if self.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        return model.eval()


def write(
    path: Path,
    family: str,
    kind: Type = Type.F16,
    *,
    tied: bool = False,
    edit: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    frequencies: NDArray[np.float32] | None = None,
    parts: int = 0,
    controls: tuple[str, ...] = (),
    **config: Any,
) -> Written:
    """Write a random model. edit: metadata that is added or replaced. without: tensors that are left out. frequencies:
    the factors of Llama 3's RoPE. parts: files that it is split into. controls: control tokens in place of the
    padding ones. config: in place of `SHAPE`."""
    tokens = [*_tokens()[: -len(controls) or None], *controls]
    settings = CONFIGS[family](**{"vocab_size": len(tokens), "tie_word_embeddings": tied} | SHAPE | config)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(settings)
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, family, split_max_tensors=0)
    _metadata(writer, settings, family, tokens)
    for key, value in (edit or {}).items():
        writer.kv_data[0].pop(key, None)
        (
            writer.add_string
            if isinstance(value, str)
            else writer.add_float32
            if isinstance(value, float)
            else writer.add_uint32
        )(key, value)
    tensors: dict[str, Tensor] = {}
    files: list[tuple[str, NDArray[Any], Type]] = []
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = (tensor + torch.randn(tensor.shape) * (0.1 if tensor.ndim == 1 else 0.05)).float().numpy()
        data, stored = _stored(values, kind, rng)
        tensors[name] = torch.from_numpy(dequantize(data, stored).copy()).to(torch.bfloat16).view(tensor.shape)
        if family == "llama" and (".q_proj." in name or ".k_proj." in name):
            data = _interleaved(data, 4 if ".q_proj." in name else 2)
        files.append((_name(name), data, stored))
    if frequencies is not None:
        files.append(("rope_freqs.weight", frequencies, Type.F32))
    chosen = [each for each in files if each[0] not in without]
    _write(writer, chosen, path, parts)
    return Written(path, tensors, settings)


def _write(writer: gguf.GGUFWriter, files: list[tuple[str, NDArray[Any], Type]], path: Path, parts: int) -> None:
    if parts:
        writer.split_max_tensors = -(-len(files) // parts)
    for name, data, stored in files:
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored(values: NDArray[np.float32], kind: Type, rng: np.random.Generator) -> tuple[NDArray[Any], Type]:
    """The values in a type; norms and biases stay in float32, and blocks of K types are random (the package decodes
    them and does not encode them)."""
    if values.ndim == 1:
        return values, Type.F32
    if kind not in K_BLOCKS:
        return quantize(values, kind), kind
    size, scale, halves = K_BLOCKS[kind]
    blocks = rng.integers(0, 256, (values.shape[0], values.shape[1] // 256, size), dtype=np.uint8)
    for number, at in enumerate(halves):  # d, then dmin, whose product with the scales centres the values
        half = np.array([scale * (1, 7.5 if kind == Type.Q4_K else 15.5)[number]], np.float16).view(np.uint8)
        blocks[..., at : at + 2] = half
    return blocks.reshape(values.shape[0], -1), kind


def _interleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows in llama.cpp's order: dimensions i and i + d/2 of a head beside each other."""
    order = [i for pair in zip(range(32), range(32, 64), strict=True) for i in pair]
    return np.concatenate([rows[64 * head : 64 * head + 64][order] for head in range(heads)])


def _name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _tokens() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", START, END, *(f"<|pad{i}|>" for i in range(6))]


def _metadata(writer: gguf.GGUFWriter, config: PretrainedConfig, family: str, tokens: list[str]) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_license("mit")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith(("<|", "<｜")) else 1 for token in tokens])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_eos_token_id(tokens.index(END))
    writer.add_pad_token_id(tokens.index(END))
    writer.add_chat_template(TEMPLATE)
