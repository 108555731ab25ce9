"""What a model is: Hugging Face `config.json` in, one frozen `ModelSpec` out.

Every quirk of a published config ends in this file. Nothing else in the engine reads a foreign key, so the model code
sees numbers only: RoPE is a tuple of inverse frequencies and one factor, whatever scaling rule they came from; the
softmax scale already carries YaRN's m²; biases are three booleans.

Two spellings are in the wild and both are read as they are: the published one (`rope_theta`, `rope_scaling {type:
…}`) and that of transformers 5 (`rope_parameters {rope_type, rope_theta, …}`). Options that would change the numbers
and that the engine does not implement (sliding windows, other activations, other routers) are refused here, by name,
rather than ignored: an ignored option is a silently different model.

The file imports neither torch nor transformers: planning reads specs too, and must start fast. Asking transformers'
own AutoConfig instead was rejected for that reason and because its defaults change between versions.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

Family = Literal["deepseek_v2", "deepseek_v3", "deepseek_v32", "llama", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "llama", "qwen2", "qwen3")

# DeepSeek's code builds the norms on the q and kv latents with the default epsilon, not with `rms_norm_eps`.
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Rope:
    """Rotary embedding, as numbers.

    dim: how many trailing dimensions of each head are rotated. inv_freq: dim/2 angles per position, in radians.
    magnitude: factor on cos and sin (YaRN's attention factor; 1 elsewhere). interleaved: pairs are (x0,x1), (x2,x3)…
    rather than (x0, x[dim/2]), (x1, x[dim/2+1])….
    """

    dim: int
    inv_freq: tuple[float, ...]
    magnitude: float
    interleaved: bool


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1). q_lora_rank None: a plain q_proj."""

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True)
class Indexer:
    """DeepSeek sparse attention (V3.2-Exp's report, section 2.1): a token attends to the `top_k` tokens that `heads`
    small heads of their own, `head_dim` wide, rank highest. Their first dimensions are rotated, as halves."""

    heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True)
class Moe:
    """Mixture of experts. group_by: what a group of experts is worth; correction_bias: whether the router has one."""

    first_layer: int
    num_experts: int
    per_token: int
    groups: int
    groups_kept: int
    shared_experts: int
    intermediate_size: int
    scoring: Literal["sigmoid", "softmax"]
    group_by: Literal["best", "best two"]
    correction_bias: bool
    normalise: bool
    routed_scale: float


@dataclass(frozen=True)
class ModelSpec:
    """One model, all families. Sizes are in elements; `softmax_scale` multiplies q·k; `head_dim` is that of q and k;
    ue8m0: where activations are quantised, to scales that are powers of two."""

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    softmax_scale: float
    rope: Rope
    max_context: int
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool = False
    mla: Mla | None = None
    indexer: Indexer | None = None
    moe: Moe | None = None
    num_nextn_predict_layers: int = 0
    ue8m0: bool = False

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.first_layer

    @property
    def cache_heads(self) -> int:
        """Heads kept per token and layer: 1 for MLA, whose latent all heads share."""
        return 1 if self.mla else self.num_kv_heads

    @property
    def cache_dims(self) -> tuple[int, ...]:
        """Width of each cached tensor of a layer: (latent + rope,) for MLA, (latent + rope, index key) for sparse
        attention, (keys, values) otherwise."""
        if self.mla:
            latent = self.mla.kv_lora_rank + self.mla.rope_dim
            return (latent, self.indexer.head_dim) if self.indexer else (latent,)
        return (self.head_dim, self.head_dim)

    def cache_elements_per_token(self, drafts: bool = False) -> int:
        """Numbers cached for one token over all layers; `drafts`: and over the layer that drafts."""
        return (self.num_layers + drafts) * self.cache_heads * sum(self.cache_dims)

    @staticmethod
    def from_dir(model_dir: Path | str) -> ModelSpec:
        """Read `model_dir/config.json`. ValueError, naming file and fix, if it is missing, broken or unsupported."""
        path = Path(model_dir) / "config.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a model directory needs the config.json it was published with")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON ({error}); download it again") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: holds a {type(raw).__name__}, not an object; download it again")
        return ModelSpec.from_config(raw, str(path))

    @staticmethod
    def from_config(raw: dict[str, Any], where: str = "config") -> ModelSpec:
        """The spec of a parsed config; `where` names it in errors."""
        config = _Config(raw, where)
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"{where}: model_type is {family!r}; supported are {', '.join(FAMILIES)}")
        if (act := raw.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"{where}: hidden_act is {act!r}; only 'silu' is supported")
        quantised = raw.get("quantization_config") or {}
        if quantised and quantised.get("quant_method") != "fp8":
            raise ValueError(
                f"{where}: weights are quantised by {quantised.get('quant_method')!r}; only 'fp8' (DeepSeek's 128x128 "
                "blocks) is supported, so use the unquantised or the FP8 checkpoint"
            )
        scale_fmt = quantised.get("scale_fmt")
        if scale_fmt not in (None, "ue8m0", "float"):
            raise ValueError(f"{where}: 'scale_fmt' is {scale_fmt!r}; only 'ue8m0' and 'float' are supported")
        spec = _deepseek(config, family) if family.startswith("deepseek") else _dense(config, family)
        return replace(spec, ue8m0=scale_fmt == "ue8m0")


class _Config:
    """A raw config with typed look-ups whose errors name the file and the key."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def _typed(self, key: str, kind: type, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is ...:
                raise ValueError(f"{self.where}: '{key}' is missing; is this the config.json of the whole model?")
            return default
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.where}: '{key}' is {value!r}; it must be of type {kind.__name__}")
        return value

    def int(self, key: str, default: Any = ...) -> int:
        value = self._typed(key, int, default)
        if value is not None and value < 0:
            raise ValueError(f"{self.where}: '{key}' is {value}; it must not be negative")
        return value

    def float(self, key: str, default: Any = ...) -> float:
        return float(self._typed(key, float, default))

    def bool(self, key: str, default: Any = ...) -> bool:
        return self._typed(key, bool, default)

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a present `key` whose value is none of `allowed`; absent and null are fine."""
        value = self.raw.get(key)
        if value is not None and value not in allowed:
            names = " or ".join(repr(a) for a in allowed)
            raise ValueError(f"{self.where}: '{key}' is {value!r}; only {names} is supported")


def _dense(c: _Config, family: Family) -> ModelSpec:
    """Llama, Qwen2 and Qwen3: grouped-query attention and a gated MLP in every layer."""
    c.only("use_sliding_window", False)
    if any(kind != "full_attention" for kind in c.raw.get("layer_types") or ()):
        raise ValueError(f"{c.where}: 'layer_types' has sliding windows; only 'full_attention' is supported")
    hidden, heads = c.int("hidden_size"), c.int("num_attention_heads")
    head_dim = c.int("head_dim", None) or hidden // heads
    kv_heads = c.int("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"{c.where}: {heads} attention heads do not divide into {kv_heads} key-value heads")
    attention_bias = c.bool("attention_bias", False)
    return ModelSpec(
        family=family,
        vocab_size=c.int("vocab_size"),
        hidden_size=hidden,
        num_layers=c.int("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=c.int("intermediate_size"),
        norm_eps=c.float("rms_norm_eps", 1e-6),
        softmax_scale=head_dim**-0.5,
        rope=_rope(c, head_dim, interleaved=False),
        max_context=c.int("max_position_embeddings"),
        tied_embeddings=c.bool("tie_word_embeddings", False),
        # Qwen2 has biases on q, k, v, and on them alone, without a key that says so.
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias and family != "qwen2",
        mlp_bias=c.bool("mlp_bias", False),
        qk_norm=family == "qwen3",
    )


def _deepseek(c: _Config, family: Family) -> ModelSpec:
    """V2, V2-Lite and V3, R1: they differ in the router and in whether queries go through a latent."""
    v2 = family == "deepseek_v2"
    c.only("scoring_func", "softmax" if v2 else "sigmoid")
    c.only("topk_method", *(("greedy", "group_limited_greedy") if v2 else ("noaux_tc",)))
    c.only("moe_layer_freq", 1)
    if v2:
        c.only("norm_topk_prob", False)
    grouped = c.raw.get("topk_method") != "greedy"
    mla = Mla(
        q_lora_rank=c.int("q_lora_rank", None),
        kv_lora_rank=c.int("kv_lora_rank"),
        nope_dim=c.int("qk_nope_head_dim"),
        rope_dim=c.int("qk_rope_head_dim"),
        v_dim=c.int("v_head_dim"),
    )
    moe = Moe(
        first_layer=c.int("first_k_dense_replace"),
        num_experts=c.int("n_routed_experts"),
        per_token=c.int("num_experts_per_tok"),
        groups=c.int("n_group", 1) if grouped else 1,
        groups_kept=c.int("topk_group", 1) if grouped else 1,
        shared_experts=c.int("n_shared_experts", 0),
        intermediate_size=c.int("moe_intermediate_size"),
        scoring="softmax" if v2 else "sigmoid",
        group_by="best" if v2 else "best two",
        correction_bias=not v2,
        normalise=c.bool("norm_topk_prob", not v2),
        routed_scale=c.float("routed_scaling_factor", 1.0),
    )
    _check_router(moe, c.where)
    indexer = None
    if family == "deepseek_v32":
        c.int("q_lora_rank")  # what the indexer's queries are made from
        indexer = Indexer(c.int("index_n_heads"), c.int("index_head_dim"), c.int("index_topk"))
    heads, head_dim = c.int("num_attention_heads"), mla.nope_dim + mla.rope_dim
    bias = c.bool("attention_bias", False)
    return ModelSpec(
        family=family,
        vocab_size=c.int("vocab_size"),
        hidden_size=c.int("hidden_size"),
        num_layers=c.int("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=c.int("intermediate_size"),
        norm_eps=c.float("rms_norm_eps", 1e-6),
        softmax_scale=head_dim**-0.5 * _yarn_softmax_factor(_rope_parameters(c)),
        rope=_rope(c, mla.rope_dim, interleaved=c.bool("rope_interleave", True)),
        max_context=c.int("max_position_embeddings"),
        tied_embeddings=c.bool("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        mla=mla,
        indexer=indexer,
        moe=moe,
        num_nextn_predict_layers=c.int("num_nextn_predict_layers", 0),
    )


def _check_router(moe: Moe, where: str) -> None:
    per_group, rest = divmod(moe.num_experts, max(moe.groups, 1))
    if not 1 <= moe.groups_kept <= moe.groups or rest or per_group < 2:
        raise ValueError(
            f"{where}: {moe.num_experts} experts in {moe.groups} groups of which {moe.groups_kept} are kept cannot be "
            "routed; groups must be equal, of two experts or more"
        )
    if not 1 <= moe.per_token <= moe.groups_kept * per_group:
        raise ValueError(f"{where}: {moe.per_token} experts per token do not fit into {moe.groups_kept} groups")


def _rope_parameters(c: _Config) -> dict[str, Any]:
    """The scaling rule under one spelling: rope_type, rope_theta, and what the type needs."""
    params = dict(c.raw.get("rope_scaling") or c.raw.get("rope_parameters") or {})
    params.setdefault("rope_type", params.get("type", "default"))
    params.setdefault("rope_theta", c.float("rope_theta", 10000.0))
    params.setdefault("original_max_position_embeddings", c.raw.get("max_position_embeddings"))
    if (part := params.get("partial_rotary_factor", c.raw.get("partial_rotary_factor"))) not in (None, 1.0):
        raise ValueError(f"{c.where}: 'partial_rotary_factor' is {part!r}; only 1.0 is supported")
    return params


def _rope(c: _Config, dim: int, interleaved: bool) -> Rope:
    params = _rope_parameters(c)
    kind, theta = params["rope_type"], float(params["rope_theta"])
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    try:
        if kind == "default":
            inv_freq, magnitude = plain, 1.0
        elif kind == "linear":
            inv_freq, magnitude = [f / params["factor"] for f in plain], 1.0
        elif kind == "llama3":
            inv_freq, magnitude = [_llama3(f, params) for f in plain], 1.0
        elif kind == "yarn":
            inv_freq, magnitude = _yarn(plain, theta, dim, params), _yarn_magnitude(params)
        else:
            raise ValueError(f"{c.where}: RoPE type {kind!r}; supported are default, linear, llama3, yarn")
    except KeyError as error:
        raise ValueError(f"{c.where}: RoPE type {kind!r} needs {error.args[0]!r}, which is missing") from error
    return Rope(dim, tuple(inv_freq), magnitude, interleaved)


def _llama3(freq: float, p: dict[str, Any]) -> float:
    """Llama 3.1's rule: long waves are slowed by `factor`, short ones kept, those between blended."""
    turns = p["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    keep = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - keep) * freq / p["factor"] + keep * freq


def _yarn(plain: list[float], theta: float, dim: int, p: dict[str, Any]) -> list[float]:
    """YaRN (arXiv:2309.00071, section 3.2): a ramp over dimensions from extrapolation to interpolation."""

    def dim_of(turns: float) -> float:
        return dim * math.log(p["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(p.get("beta_fast") or 32), dim_of(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # a ramp of no width would divide by zero
    scaled = []
    for i, freq in enumerate(plain):
        interpolate = min(max((i - low) / width, 0.0), 1.0)
        scaled.append(freq / p["factor"] * interpolate + freq * (1 - interpolate))
    return scaled


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_magnitude(p: dict[str, Any]) -> float:
    """Factor on cos and sin. DeepSeek gives mscale and mscale_all_dim, equal in V3, so that it is 1 there."""
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return _yarn_mscale(p["factor"], p["mscale"]) / _yarn_mscale(p["factor"], p["mscale_all_dim"])
    return _yarn_mscale(p["factor"], 1.0)


def _yarn_softmax_factor(p: dict[str, Any]) -> float:
    """DeepSeek's m² on the softmax scale, over all dimensions of a head."""
    if p["rope_type"] == "default" or not p.get("mscale_all_dim"):
        return 1.0
    return _yarn_mscale(p["factor"], p["mscale_all_dim"]) ** 2
