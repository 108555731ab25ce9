"""DeepSeek-V3.2 and V3.2-Exp: V3 with sparse attention, whose tokens an indexer chooses."""

from __future__ import annotations

from dataclasses import replace

from distill.engine.config import MOST_LAYERS, WIDEST, WIDEST_HEAD, Config
from distill.engine.families.deepseek import read_deepseek
from distill.engine.families.deepseek_v3 import ROUTER
from distill.engine.families.family import Family
from distill.engine.spec import Indexer, ModelSpec


def read(config: Config) -> ModelSpec:
    """The spec of a V3.2 config."""
    config.only("rope_interleave", (True,))
    config.only("indexer_rope_interleave", (False,))
    return read_sparse(config, "deepseek_v32")


def read_sparse(
    config: Config, family: str, *, interleaved: bool = False, shared_layers: frozenset[int] = frozenset()
) -> ModelSpec:
    """The spec of a model with V3's layers and sparse attention. interleaved, shared_layers: of `Indexer`.

    The indexer's queries are made from the query latent, which is required here.
    """
    config.int("q_lora_rank", most=WIDEST)
    layers, experts = config.int("num_hidden_layers", most=MOST_LAYERS), config.int("n_routed_experts")
    dense = min(config.int("first_k_dense_replace", least=0, most=MOST_LAYERS), layers)
    if config.texts("mlp_layer_types") not in ([], ["dense"] * dense + ["sparse"] * (layers - dense)):
        raise ValueError(
            f"{config.where}: 'mlp_layer_types' is not {dense} times 'dense' ('first_k_dense_replace') and then "
            "'sparse'; no other order is supported"
        )
    config.only("num_experts", (experts,))
    indexer = Indexer(
        heads=config.int("index_n_heads", most=WIDEST),
        head_dim=config.int("index_head_dim", most=WIDEST_HEAD),
        top_k=config.int("index_topk"),
        interleaved=interleaved,
        shared_layers=shared_layers,
    )
    spec = read_deepseek(config, family, ROUTER)
    if indexer.head_dim < spec.rope.dim:
        raise ValueError(
            f"{config.where}: 'index_head_dim' is {indexer.head_dim}; its first {spec.rope.dim} are to be rotated"
        )
    return replace(spec, indexer=indexer)


FAMILY = Family("deepseek_v32", read, published_bytes=1, has_experts=True)
