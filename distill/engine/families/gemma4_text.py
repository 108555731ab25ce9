"""Gemma 4, its language model alone: dense layers, most of which have a sliding window.

What is its own: heads, rotary base and rotated share of layers without a window; values that are the keys, or the keys
and values of an earlier layer; norms of queries, keys and values and of what attention and MLP add; an embedding of
each token for every layer; factors on embeddings and layers; logits below a cap. The version with experts is refused.
"""

from __future__ import annotations

from distill.engine.config import MOST_LAYERS, WIDEST, WIDEST_HEAD, Config
from distill.engine.families.family import Family
from distill.engine.families.names import WeightNames
from distill.engine.spec import ModelSpec, Rope, Sliding

WINDOWED, WHOLE = "sliding_attention", "full_attention"
EVERY = 6  # each so many layers one has no window, where the config does not list them
GLOBAL_HEAD, VOCABULARY, WINDOW = 512, 262144, 512  # what its transformers class takes where a config is silent
THETA = {WINDOWED: 1e4, WHOLE: 1e6}
ROTATED = 0.25  # of a head in layers without a window

NAMES = WeightNames(mlp_norm="pre_feedforward_layernorm.weight")


def read(config: Config) -> ModelSpec:
    """The spec of the language model's config."""
    return read_text(config, "gemma4_text")


def read_text(config: Config, family: str) -> ModelSpec:
    """The spec of a family with these layers. Errors: ValueError naming file and key."""
    if config.bool("enable_moe_block", False):
        raise ValueError(
            f"{config.where}: 'enable_moe_block' is true; Gemma 4 with experts is not supported, use a dense size"
        )
    config.only("use_bidirectional_attention", ("vision",))
    config.only("hidden_activation", ("gelu_pytorch_tanh",))
    layers = config.int("num_hidden_layers", most=MOST_LAYERS)
    kinds = _kinds(config, layers)
    heads = config.int("num_attention_heads", most=WIDEST)
    local_heads, local_dim = config.int("num_key_value_heads", most=WIDEST), config.int("head_dim", most=WIDEST_HEAD)
    keys_as_values = config.bool("attention_k_eq_v", False)
    kv_heads, head_dim = _heads_without_window(config, kinds, keys_as_values)
    for count in (local_heads, kv_heads):
        if heads % count:
            raise ValueError(f"{config.where}: 'num_attention_heads' {heads} is no multiple of {count} key-value heads")
    shared, width = _shared(config, kinds), config.int("intermediate_size", most=WIDEST)
    vocabulary, input_dim = config.int("vocab_size", most=WIDEST), _input_dim(config)
    bias = config.bool("attention_bias", False)
    windowed = frozenset(layer for layer, kind in enumerate(kinds) if kind == WINDOWED)
    window = config.int("sliding_window", WINDOW)
    return ModelSpec(
        family=family,
        vocab_size=vocabulary,
        hidden_size=config.int("hidden_size", most=WIDEST),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=width,
        norm_eps=config.float("rms_norm_eps", 1e-6, above=0, most=1),
        softmax_scale=1.0,
        rope=_rope(config, WHOLE, head_dim),
        max_context=config.int("max_position_embeddings"),
        tied_embeddings=config.bool("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        qk_norm=True,
        sliding=Sliding(window, windowed, local_heads, local_dim, _rope(config, WINDOWED, local_dim)),
        shared_kv_layers=shared,
        shared_kv_mlp=width * (2 if config.bool("use_double_wide_mlp", False) else 1) if shared else 0,
        keys_as_values=keys_as_values,
        value_norm=True,
        post_norms=True,
        activation="gelu_tanh",
        layer_input_dim=input_dim,
        layer_scalars=True,
        embedding_scale=config.int("hidden_size", most=WIDEST) ** 0.5,
        logit_cap=config.float("final_logit_softcapping", above=0) if config.has("final_logit_softcapping") else None,
    )


def _kinds(config: Config, layers: int) -> list[str]:
    kinds = config.texts("layer_types") or [
        WHOLE if layer % EVERY == EVERY - 1 or layer == layers - 1 else WINDOWED for layer in range(layers)
    ]
    if not {*kinds} <= {WINDOWED, WHOLE} or len(kinds) != layers or kinds[-1] != WHOLE:
        raise ValueError(
            f"{config.where}: 'layer_types' must list {layers} values, each '{WINDOWED}' or '{WHOLE}', the last one "
            f"'{WHOLE}'"
        )
    return kinds


def _heads_without_window(config: Config, kinds: list[str], keys_as_values: bool) -> tuple[int, int]:
    """(key-value heads, width of a head) of layers without a window: by two keys of the published configs, or by what
    transformers writes, the differences of each layer. Errors: ValueError where these layers differ."""
    own, width = config.int("num_key_value_heads", most=WIDEST), config.int("head_dim", most=WIDEST_HEAD)
    if not config.has("per_layer_config"):
        given = config.int_or("num_global_key_value_heads", None, most=WIDEST) if keys_as_values else None
        return given or own, config.int("global_head_dim", GLOBAL_HEAD, most=WIDEST_HEAD)
    differences = config.section("per_layer_config")
    parts = (
        {} if differences is None else {_number(differences, key): differences.section(key) for key in differences.raw}
    )
    found: set[tuple[int, int]] = set()
    for layer, kind in enumerate(kinds):
        part = parts.get(layer)
        if part is not None and (other := sorted(part.raw.keys() - {"head_dim", "num_key_value_heads"})):
            raise ValueError(f"{part.where}: '{other[0]}' differs between layers; that is not supported")
        values = Config({} if part is None else part.raw, config.where if part is None else part.where)
        shape = values.int("num_key_value_heads", own, most=WIDEST), values.int("head_dim", width, most=WIDEST_HEAD)
        if kind == WHOLE:
            found.add(shape)
        elif shape != (own, width):
            raise ValueError(f"{values.where}: layers of one kind have other heads; that is not supported")
    if len(found) != 1:
        raise ValueError(f"{config.where}: 'per_layer_config': layers of one kind have other heads; not supported")
    return found.pop()


def _number(differences: Config, key: str) -> int:
    """The layer that a key of `per_layer_config` means: its number, perhaps with zeros in front."""
    if not (key.isascii() and key.isdigit()):
        raise ValueError(f"{differences.where}: '{key}' is not the number of a layer")
    return int(key)


def _shared(config: Config, kinds: list[str]) -> int:
    """How many of the last layers attend to keys and values of earlier ones."""
    shared = config.int("num_kv_shared_layers", 0, least=0, most=len(kinds))
    if shared and {*kinds[: len(kinds) - shared]} != {*kinds}:
        raise ValueError(
            f"{config.where}: 'num_kv_shared_layers' is {shared}; no layer before those has the keys and values of "
            "each of their kinds"
        )
    return shared


def _input_dim(config: Config) -> int:
    width = config.int("hidden_size_per_layer_input", 256, least=0, most=WIDEST)
    rows, vocabulary = config.int("vocab_size_per_layer_input", VOCABULARY, most=WIDEST), config.int("vocab_size")
    if width and rows != vocabulary:
        raise ValueError(
            f"{config.where}: 'vocab_size_per_layer_input' is {rows} and 'vocab_size' is {vocabulary}; they must be "
            "equal"
        )
    return width


def _rope(config: Config, kind: str, head_dim: int) -> Rope:
    """The rotary embedding of one kind of layers. Proportional: the first share of a head's pairs is rotated, by the
    angles that it has where all are; the others by none."""
    if head_dim % 2:
        raise ValueError(f"{config.where}: heads are {head_dim} wide; they must be even to be rotated")
    every = config.section("rope_parameters")
    section = every.section(kind) if every is not None else None
    if every is not None and section is None:
        raise ValueError(f"{every.where}: '{kind}' is missing; it has the RoPE of these layers")
    default, share = ("default", 1.0) if kind == WINDOWED else ("proportional", ROTATED)
    values = section or Config({"rope_type": default, "partial_rotary_factor": share}, config.where)
    values.only("rope_type", ("default", "proportional"))
    pairs, factor = head_dim // 2, 1.0
    if values.text("rope_type", "default") == "proportional":
        pairs = int(values.float("partial_rotary_factor", 1.0, least=0, most=1) * head_dim // 2)
        factor = values.float("factor", 1.0, above=0)
    else:
        values.only("partial_rotary_factor", (1.0, 1))
    theta = values.float("rope_theta", THETA[kind], above=1.0)
    turned = [theta ** (-2 * i / head_dim) / factor for i in range(pairs)]
    return Rope(head_dim, (*turned, *[0.0] * (head_dim // 2 - pairs)), 1.0, interleaved=False)


FAMILY = Family("gemma4_text", read, names=NAMES, trains=True)
