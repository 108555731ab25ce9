"""GLM-5, 5.1 and 5.2: DeepSeek-V3.2's layers, with an indexer that rotates pairs.

GLM-5.2 has layers that share an indexer (arXiv:2603.12201): they attend to the tokens that the last layer with one
chose. Three spellings say which layers have one: a list, a pattern of letters, or a frequency with an offset.
"""

from __future__ import annotations

from distill.engine.config import MOST_LAYERS, Config
from distill.engine.families.deepseek_v32 import read_sparse
from distill.engine.families.family import Family
from distill.engine.spec import ModelSpec

OFFSET = 2  # layers with an indexer before the frequency counts, where the config does not say


def read(config: Config) -> ModelSpec:
    """The spec of a GLM-5 config. Keys whose defaults are other than DeepSeek's are required."""
    config.float("rms_norm_eps")
    config.float("routed_scaling_factor")
    config.only("mlp_bias", (False,))
    for key in ("rope_interleave", "indexer_rope_interleave"):
        config.only(key, (True,))
    layers = config.int("num_hidden_layers", most=MOST_LAYERS)
    if any(kind != "indexed_attention" for kind in config.texts("layer_types")):
        raise ValueError(f"{config.where}: 'layer_types' has others than 'indexed_attention'; they are not supported")
    return read_sparse(config, "glm_moe_dsa", interleaved=True, shared_layers=_shared_layers(config, layers))


def _shared_layers(config: Config, layers: int) -> frozenset[int]:
    if config.has("indexer_types"):
        key, kinds = "indexer_types", config.texts("indexer_types")
    elif config.has("index_topk_pattern"):
        key, pattern = "index_topk_pattern", config.raw["index_topk_pattern"]
        letters = {"F": "full", "S": "shared"}
        kinds = [letters.get(letter, letter) for letter in pattern] if isinstance(pattern, str) else config.texts(key)
    else:
        key, every = "index_topk_freq", max(config.int("index_topk_freq", 1, least=0, most=MOST_LAYERS), 1)
        offset = config.int("index_skip_topk_offset", OFFSET, least=0, most=MOST_LAYERS)
        kinds = ["shared" if max(layer - offset + 1, 0) % every else "full" for layer in range(layers)]
    if len(kinds) != layers or not {*kinds} <= {"full", "shared"} or kinds[0] != "full":
        raise ValueError(
            f"{config.where}: '{key}' does not say 'full' or 'shared' of each of {layers} layers, with 'full' first"
        )
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "shared")


FAMILY = Family("glm_moe_dsa", read, published_bytes=1, has_experts=True)
