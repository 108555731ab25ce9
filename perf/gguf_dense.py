"""A dense model directory (of Llama or Qwen2) as GGUF, F16 or Q8_0, as llama.cpp's own converter writes it.

1-d tensors are float32, and Llama's query and key rows are in the order in which llama.cpp rotates them. The file has
no tokenizer.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from gguf_form import NAMES
from safetensors import safe_open
from torch import Tensor

KINDS = {"F16": gguf.GGMLQuantizationType.F16, "Q8_0": gguf.GGMLQuantizationType.Q8_0}
_DENSE = NAMES | {
    f"self_attn.{part}_proj.{kind}": f"attn_{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")
}


def write_dense(directory: Path, file: Path, kind: str) -> Path:
    """Write a model directory as a GGUF file, unless it is there. kind: a key of KINDS."""
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    architecture = {"llama": "llama", "qwen2": "qwen2"}[config["model_type"]]
    partial = file.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    _describe(writer, config)
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dictionary
                stem, layer = name, ""
                if name.startswith("model.layers."):
                    _, _, number, stem = name.split(".", 3)
                    layer = f"blk.{number}."
                array = _array(tensors.get_tensor(name), stem, architecture, config)
                if array.ndim == 1:
                    writer.add_tensor(layer + _DENSE[stem], array)
                else:
                    writer.add_tensor(layer + _DENSE[stem], quantize(array, KINDS[kind]), raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(file)
    return file


def _array(weight: Tensor, stem: str, architecture: str, config: dict[str, int]) -> np.ndarray:
    """Float32; Llama's rotated rows go from halves to interleaved pairs."""
    heads = {"self_attn.q_proj.weight": "num_attention_heads", "self_attn.k_proj.weight": "num_key_value_heads"}
    if architecture == "llama" and stem in heads:
        halves = weight.view(config[heads[stem]], 2, -1, weight.shape[-1])
        weight = halves.transpose(1, 2).reshape(weight.shape)
    return weight.float().contiguous().numpy()


def _describe(writer: gguf.GGUFWriter, config: dict[str, int]) -> None:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
