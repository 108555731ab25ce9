"""What the DeepSeek families share: latent attention, dense layers first, then mixtures of experts.

They differ in the router, in whether queries go through a latent (V2-Lite has none), and in sparse attention (V3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.engine.config import MOST_EXPERTS, MOST_LAYERS, WIDEST, WIDEST_HEAD, Config
from distill.engine.rope import RopeConfig
from distill.engine.spec import GroupBy, Mla, ModelSpec, Moe, Scoring


@dataclass(frozen=True)
class Router:
    """How a generation's router works. methods: the values of `topk_method` that are this router; normalise: whether
    the weights of the chosen experts sum to one where the config does not say."""

    scoring: Scoring
    group_by: GroupBy
    methods: tuple[str, ...]
    correction_bias: bool
    normalise: bool


def read_deepseek(config: Config, family: str, router: Router) -> ModelSpec:
    """The spec of a DeepSeek model. Errors: ValueError naming file and key."""
    config.only("scoring_func", (router.scoring,))
    config.only("topk_method", router.methods)
    config.only("moe_layer_freq", (1,))
    mla = Mla(
        q_lora_rank=config.int_or("q_lora_rank", None, most=WIDEST),
        kv_lora_rank=config.int("kv_lora_rank", most=WIDEST),
        nope_dim=config.int("qk_nope_head_dim", most=WIDEST_HEAD),
        rope_dim=config.int("qk_rope_head_dim", most=WIDEST_HEAD),
        v_dim=config.int("v_head_dim", most=WIDEST_HEAD),
    )
    heads, head_dim = config.int("num_attention_heads", most=WIDEST), mla.nope_dim + mla.rope_dim
    bias, rope = config.bool("attention_bias", False), RopeConfig(config)
    return ModelSpec(
        family=family,
        vocab_size=config.int("vocab_size", most=WIDEST),
        hidden_size=config.int("hidden_size", most=WIDEST),
        num_layers=config.int("num_hidden_layers", most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=config.int("intermediate_size", most=WIDEST),
        norm_eps=config.float("rms_norm_eps", 1e-6, above=0, most=1),
        softmax_scale=head_dim**-0.5 * rope.softmax_factor,
        rope=rope.rope(mla.rope_dim, interleaved=config.bool("rope_interleave", True)),
        max_context=config.int("max_position_embeddings"),
        tied_embeddings=config.bool("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        mla=mla,
        moe=_moe(config, router),
        num_nextn_predict_layers=config.int("num_nextn_predict_layers", 0, least=0, most=MOST_LAYERS),
    )


def _moe(config: Config, router: Router) -> Moe:
    """Errors: ValueError, also for a missing key whose default would be another model in transformers."""
    grouped = config.text("topk_method", router.methods[0]) != "greedy"
    if router.scoring == "sigmoid":
        for key in ("n_group", "topk_group"):
            config.int(key)
        config.float("routed_scaling_factor")
    moe = Moe(
        first_layer=config.int("first_k_dense_replace", least=0, most=MOST_LAYERS),
        num_experts=config.int("n_routed_experts", most=MOST_EXPERTS),
        per_token=config.int("num_experts_per_tok", most=MOST_EXPERTS),
        groups=config.int("n_group", 1, most=MOST_EXPERTS) if grouped else 1,
        groups_kept=config.int("topk_group", 1, most=MOST_EXPERTS) if grouped else 1,
        shared_experts=config.int("n_shared_experts", 0, least=0, most=MOST_EXPERTS),
        intermediate_size=config.int("moe_intermediate_size", most=WIDEST),
        scoring=router.scoring,
        group_by=router.group_by,
        correction_bias=router.correction_bias,
        normalise=config.bool("norm_topk_prob", router.normalise),
        routed_scale=config.float("routed_scaling_factor", 1.0, above=0),
    )
    per_group, rest = divmod(moe.num_experts, moe.groups)
    if not moe.groups_kept <= moe.groups or rest or per_group < 2:
        raise ValueError(
            f"{config.where}: {moe.num_experts} experts in {moe.groups} groups of which {moe.groups_kept} are kept "
            "cannot be routed; groups must be equal, of two experts or more"
        )
    if moe.per_token > moe.groups_kept * per_group:
        raise ValueError(f"{config.where}: {moe.per_token} experts per token do not fit into {moe.groups_kept} groups")
    return moe
