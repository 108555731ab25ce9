"""The metadata of a GGUF file as the config of a model directory: keys, types and RoPE.

The keys are llama.cpp's (`llama.block_count`), the result has the names of transformers. Llama 3's RoPE has no key: the
file has its factors as the tensor `rope_freqs.weight`, one for each frequency, from which the published rule is found
again; factors of another rule are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from distill.engine.families import FAMILIES
from distill.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

Value: TypeAlias = "bool | int | float | str | list[Value]"

READ = {  # below the architecture's name; of the others any may change the numbers
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
    "vocab_size",
    "expert_count",
    "expert_used_count",
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CLOSE = 1e-3  # relative: factors are stored in float32


@dataclass(frozen=True)
class Metadata:
    """Keys and values, with typed look-ups. Errors of each: UserError naming file and key."""

    values: Mapping[str, Value]
    where: Path

    @classmethod
    def of(cls, reader: GGUFReader, where: Path) -> Metadata:
        """The metadata of an opened file; of the tokenizer's lists only that they are there."""
        lists = {"tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"}
        try:
            return cls({key: [] if key in lists else field.contents() for key, field in reader.fields.items()}, where)
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{where}: its metadata cannot be read; download the file again") from error

    def int(self, key: str, default: int | None = None) -> int:
        """A whole number; without a default the key is required."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "a whole number")
        return value

    def float(self, key: str, default: float | None = None) -> float:
        """A number; without a default the key is required."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, value, "a number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A text; without a default the key is required."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def _value(self, key: str, default: Value | None) -> Value:
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.where}: {key} is missing in its metadata; download the file again")
        return value

    def _wrong(self, key: str, value: Value, kind: str) -> UserError:
        return UserError(f"{self.where}: {key} is {str(value)[:40]}, not {kind}; download the file again")


def config_of(
    metadata: Metadata, shapes: Mapping[str, Sequence[int]], tied: bool, frequencies: Sequence[float] | None
) -> dict[str, object]:
    """The config.json of a file. shapes: of its tensors. frequencies: the factors of Llama 3's RoPE, where it has them.

    Errors: UserError for another family, or a key that is missing, of another type, or not read.
    """
    family = metadata.text("general.architecture")
    stored = FAMILIES[family].gguf if family in FAMILIES else None
    if stored is None:
        supported = ", ".join(name for name, known in FAMILIES.items() if known.gguf)
        raise UserError(
            f"{metadata.where}: GGUF files of family {family[:40]!r} are not read; supported are {supported}: "
            f"use the hub id of the model"
        )
    _refuse_unread(metadata, family)
    heads = metadata.int(f"{family}.attention.head_count")
    hidden = metadata.int(f"{family}.embedding_length")
    head_dim = metadata.int(f"{family}.attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := metadata.int(f"{family}.{key}", head_dim)) != head_dim:
            raise UserError(f"{metadata.where}: {family}.{key} is {width}, and a head has {head_dim}; it is not read")
    context = metadata.int(f"{family}.context_length")
    config: dict[str, object] = {
        "architectures": [stored.architecture],
        "model_type": family,
        "dtype": "bfloat16",
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": metadata.int(f"{family}.feed_forward_length"),
        "num_hidden_layers": metadata.int(f"{family}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.int(f"{family}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": metadata.float(f"{family}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": context,
        "rope_parameters": _rope(metadata, family, head_dim, frequencies),
        "tie_word_embeddings": tied,
    }
    if stored.attention_bias:
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if stored.mlp_bias:
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    return config | generation_config(metadata)


def generation_config(metadata: Metadata) -> dict[str, object]:
    """The ids of the tokens that begin, end and pad. Two tokens may end: that of a text and that of a turn."""
    ends = [
        metadata.int(key)
        for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        if key in metadata.values
    ]
    ids: dict[str, object] = {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in metadata.values:
            ids[name] = metadata.int(f"tokenizer.ggml.{key}_token_id")
    return ids


def _refuse_unread(metadata: Metadata, family: str) -> None:
    for key, value in metadata.values.items():
        if key.startswith(f"{family}.") and key.removeprefix(f"{family}.") not in READ:
            raise UserError(
                f"{metadata.where}: {key} is {str(value)[:40]}, which is not read and may change the model; use the "
                f"hub id of the model"
            )
    if metadata.int(f"{family}.expert_count", 0):
        raise UserError(
            f"{metadata.where}: a mixture of experts (family {family}), which is not read as GGUF; use the hub id of "
            f"the model"
        )


def _rope(
    metadata: Metadata, family: str, head_dim: int, frequencies: Sequence[float] | None
) -> dict[str, float | int | str]:
    """`rope_parameters` of transformers."""
    theta = metadata.float(f"{family}.rope.freq_base", 10000.0)
    scale = f"{family}.rope.scaling.factor"
    kind = metadata.text(f"{family}.rope.scaling.type", "linear" if metadata.float(scale, 1.0) != 1.0 else "none")
    magnitude = metadata.float(f"{family}.rope.scaling.attn_factor", 1.0)
    if kind != "yarn" and magnitude != 1.0:
        raise UserError(
            f"{metadata.where}: {family}.rope.scaling.attn_factor is {magnitude:g} without YaRN, which is not read; "
            f"use the hub id of the model"
        )
    rope: dict[str, float | int | str] = {"rope_type": "default", "rope_theta": theta}
    if kind != "none" and frequencies is not None:
        raise UserError(f"{metadata.where}: RoPE is scaled by {kind!r} and by rope_freqs.weight; it is not read")
    if frequencies is not None:
        return rope | _llama3(metadata.where, theta, head_dim, frequencies)
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise UserError(f"{metadata.where}: RoPE scaling {kind[:40]!r} is not read; use the hub id of the model")
    rope |= {"rope_type": kind, "factor": metadata.float(scale)}
    if kind == "yarn":
        original = f"{family}.rope.scaling.original_context_length"
        rope["original_max_position_embeddings"] = metadata.int(original)
        if magnitude != 1.0:  # llama.cpp multiplies YaRN's magnitude by it, transformers' key replaces it
            rope["attention_factor"] = (0.1 * math.log(max(metadata.float(scale), 1.0)) + 1) * magnitude
    return rope


def _llama3(where: Path, theta: float, head_dim: int, frequencies: Sequence[float]) -> dict[str, float | int | str]:
    """Llama 3's rule, if it gives these factors (how many times slower each frequency is). Errors: UserError."""
    factor = max(frequencies, default=1.0)
    if all(math.isclose(value, 1.0, rel_tol=CLOSE) for value in frequencies):
        return {}
    low, high, original = LLAMA3.values()
    expected = []
    for i in range(head_dim // 2):
        turns = original * theta ** (-2 * i / head_dim) / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        expected.append(1 / ((1 - keep) / factor + keep))
    close = len(expected) == len(frequencies) and all(
        math.isclose(a, b, rel_tol=CLOSE) for a, b in zip(expected, frequencies, strict=True)
    )
    if not close:
        raise UserError(f"{where}: rope_freqs.weight is of another rule than Llama 3's; use the hub id of the model")
    return {"rope_type": "llama3", "factor": round(factor, 3), **LLAMA3}
