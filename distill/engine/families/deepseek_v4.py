"""DeepSeek-V4 and V4-Flash: compressed attention, hyper-connections, experts in every layer, hash routing in the first.

Two spellings are read: the published one (`compress_ratios`, `num_hash_layers`, `rope_scaling`) and that of
transformers (`layer_types`, `compress_rates`, `mlp_layer_types`, nested `rope_parameters`). Weights have the published
names.

Tensors of the multi-token-prediction layer (`mtp.…`) are left unread: transformers does not describe that layer.
"""

from __future__ import annotations

from distill.engine.config import MOST_EXPERTS, MOST_LAYERS, WIDEST, WIDEST_HEAD, Config, Json, shown
from distill.engine.families.family import Family
from distill.engine.families.names import MlpNames, MoeNames, WeightNames
from distill.engine.rope import RopeConfig
from distill.engine.spec import Compressed, Indexer, ModelSpec, Moe, Rope, Streams

WINDOW, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
RATES = {SPARSE: 4, HEAVY: 128}  # tokens of an entry, where the config does not say
KINDS = {0: WINDOW, 4: SPARSE, 128: HEAVY}  # by `compress_ratios`
HASH_LAYERS = 3
COMPRESS_THETA = 160000.0
LONGEST_WINDOW = 1 << 20


def read(config: Config) -> ModelSpec:
    """The spec of a V4 config. Keys whose defaults are not obvious are required. Errors: ValueError naming file and
    key."""
    _check_expert_dtype(config)
    for key, value in (("norm_topk_prob", True), ("attention_bias", False), ("mlp_bias", False)):
        config.only(key, (value,))
    config.only("num_key_value_heads", (1,))
    config.only("n_shared_experts", (1,))
    config.only("topk_method", ("noaux_tc",))
    layers, head_dim = config.int("num_hidden_layers", most=MOST_LAYERS), config.int("head_dim", most=WIDEST_HEAD)
    heads, rope_dim = config.int("num_attention_heads", most=WIDEST), _rope_dim(config, head_dim)
    main, compress = _ropes(config, rope_dim, head_dim)
    return ModelSpec(
        family="deepseek_v4",
        vocab_size=config.int("vocab_size", most=WIDEST),
        hidden_size=config.int("hidden_size", most=WIDEST),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=1,
        head_dim=head_dim,
        intermediate_size=config.int("moe_intermediate_size", most=WIDEST),
        norm_eps=config.float("rms_norm_eps", 1e-6, above=0, most=1),
        softmax_scale=head_dim**-0.5,
        rope=main,
        max_context=config.int("max_position_embeddings"),
        tied_embeddings=config.bool("tie_word_embeddings", False),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        moe=_moe(config, layers),
        compressed=_compressed(config, layers, heads, compress),
        streams=Streams(
            count=config.int("hc_mult", most=64),
            iterations=config.int("hc_sinkhorn_iters", most=1000),
            eps=config.float("hc_eps", least=0, most=1),
        ),
    )


def _check_expert_dtype(config: Config) -> None:
    """How experts are stored is read from their tensors; a form that is not known is refused here."""
    for section in (config, config.section("quantization_config")):
        if section is not None and section.raw.get("expert_dtype") is not None:
            section.only("expert_dtype", ("fp4", "fp8", "bf16", "bfloat16"))


def _rope_dim(config: Config, head_dim: int) -> int:
    share = config.float("partial_rotary_factor", 0.0, least=0, most=1)
    dim = int(head_dim * share) if share else config.int("qk_rope_head_dim", most=WIDEST_HEAD)
    if not 0 < dim <= head_dim:
        raise ValueError(
            f"{config.where}: the rotary width is {dim}; it must be from 1 to head_dim, which is {head_dim}"
        )
    return dim


def _ropes(config: Config, dim: int, head_dim: int) -> tuple[Rope, Rope]:
    """The rotation of layers without entries, and of those with them, which alone may be scaled (YaRN, without a factor
    on cos and sin)."""
    section = config.section("rope_parameters")
    nested = section and (section.section("main"), section.section("compress"))
    if nested and nested[0] and nested[1]:
        main, compress = (dict(part.raw) for part in nested if part)
    else:
        flat = config.section("rope_scaling") or section
        main = {"rope_theta": config.float("rope_theta", above=1)}
        compress = dict(flat.raw) if flat else {}
        compress["rope_theta"] = config.float("compress_rope_theta", COMPRESS_THETA, above=1)
        if compress.get("rope_type", compress.get("type")) == "yarn" and compress.get("attention_factor") is None:
            compress["attention_factor"] = 1.0
    return _rope(config, main, dim, head_dim), _rope(config, compress, dim, head_dim)


def _rope(config: Config, values: dict[str, Json], dim: int, head_dim: int) -> Rope:
    share = Config(values, f"{config.where}: rope_parameters").float("partial_rotary_factor", dim / head_dim, above=0)
    if int(head_dim * share) != dim:
        raise ValueError(
            f"{config.where}: 'partial_rotary_factor' is {share:g} in rope_parameters, and the rotary "
            f"width is {dim} of {head_dim}; both must say the same"
        )
    rest: dict[str, Json] = {key: value for key, value in values.items() if key != "partial_rotary_factor"}
    context = config.int("max_position_embeddings")
    own: dict[str, Json] = {"rope_parameters": rest, "max_position_embeddings": context}
    return RopeConfig(Config(own, config.where)).rope(dim, interleaved=True)


def _compressed(config: Config, layers: int, heads: int, rope: Rope) -> Compressed:
    kinds, rates = _kinds(config, layers), dict(RATES)
    section = config.section("compress_rates") or Config({}, config.where)
    for kind, short in ((SPARSE, "csa"), (HEAVY, "hca")):
        rates[kind] = config.int(f"compress_rate_{short}", section.int(kind, rates[kind], most=LONGEST_WINDOW))
    groups = config.int("o_groups", most=WIDEST)
    if heads % groups:
        raise ValueError(f"{config.where}: 'num_attention_heads' {heads} is no multiple of 'o_groups' {groups}")
    index_dim = config.int("index_head_dim", most=WIDEST_HEAD)
    if index_dim < rope.dim:
        raise ValueError(f"{config.where}: 'index_head_dim' is {index_dim}; its last {rope.dim} are to be rotated")
    return Compressed(
        window=config.int("sliding_window", most=LONGEST_WINDOW),
        rates=tuple(rates.get(kind, 0) for kind in kinds),
        sparse_layers=frozenset(layer for layer, kind in enumerate(kinds) if kind == SPARSE),
        rope=rope,
        indexer=Indexer(
            config.int("index_n_heads", most=WIDEST), index_dim, config.int("index_topk"), interleaved=True
        ),
        q_rank=config.int("q_lora_rank", most=WIDEST),
        o_groups=groups,
        o_rank=config.int("o_lora_rank", most=WIDEST),
    )


def _kinds(config: Config, layers: int) -> list[str]:
    """Read the kind of each layer; `compress_ratios` may list layers that draft after the others."""
    if config.has("layer_types"):
        key, kinds = "layer_types", config.texts("layer_types")
    elif config.has("compress_ratios"):
        key = "compress_ratios"
        kinds = [KINDS.get(ratio, str(ratio)) for ratio in config.ints("compress_ratios", most=LONGEST_WINDOW)]
    else:
        raise ValueError(f"{config.where}: 'compress_ratios' or 'layer_types' is required")
    kinds = kinds[:layers]
    if len(kinds) < layers or not {*kinds} <= {WINDOW, SPARSE, HEAVY}:
        known = "0, 4 or 128" if key == "compress_ratios" else f"{WINDOW}, {SPARSE} or {HEAVY}"
        raise ValueError(f"{config.where}: '{key}' must list {layers} values, each {known}")
    return kinds


def _moe(config: Config, layers: int) -> Moe:
    if config.has("mlp_layer_types"):
        kinds = config.texts("mlp_layer_types")
        if len(kinds) != layers or not {*kinds} <= {"hash_moe", "moe"}:
            raise ValueError(f"{config.where}: 'mlp_layer_types' must list {layers} values, each 'hash_moe' or 'moe'")
        by_token = frozenset(layer for layer, kind in enumerate(kinds) if kind == "hash_moe")
    else:
        by_token = frozenset(range(min(config.int("num_hash_layers", HASH_LAYERS, least=0, most=MOST_LAYERS), layers)))
    scoring = config.text("scoring_func", "sqrtsoftplus")
    if scoring not in ("sqrtsoftplus", "sigmoid"):
        raise ValueError(
            f"{config.where}: 'scoring_func' is {shown(scoring)}; 'sqrtsoftplus' and 'sigmoid' are supported"
        )
    experts, per_token = config.int("n_routed_experts", most=MOST_EXPERTS), config.int("num_experts_per_tok")
    if per_token > experts:
        raise ValueError(f"{config.where}: {per_token} experts per token of {experts}")
    return Moe(
        first_layer=0,
        num_experts=experts,
        per_token=per_token,
        groups=1,
        groups_kept=1,
        shared_experts=1,
        intermediate_size=config.int("moe_intermediate_size", most=WIDEST),
        scoring="sigmoid" if scoring == "sigmoid" else "sqrtsoftplus",
        group_by="best two",
        correction_bias=True,
        normalise=True,
        routed_scale=config.float("routed_scaling_factor", above=0),
        by_token=by_token,
        limit=config.float("swiglu_limit", above=0),
    )


NAMES = WeightNames(
    embed="embed.weight",
    norm="norm.weight",
    head="head.weight",
    layer="layers.{}.",
    attention_norm="attn_norm.weight",
    mlp_norm="ffn_norm.weight",
    mlp=MlpNames(gate="w1", up="w3", down="w2"),
    moe=MoeNames(
        router="ffn.gate.weight",
        correction_bias="ffn.gate.bias",
        expert="ffn.experts.{}.",
        shared="ffn.shared_experts.",
        by_token="ffn.gate.tid2eid",
    ),
    beside=("mtp.",),
)
FAMILY = Family("deepseek_v4", read, NAMES, published_bytes=0.57, has_experts=True)
