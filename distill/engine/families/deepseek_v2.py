"""DeepSeek-V2, V2-Lite and their Coder versions: softmax router; a group of experts is scored by its best."""

from __future__ import annotations

from distill.engine.config import Config
from distill.engine.families.deepseek import Router, read_deepseek
from distill.engine.families.family import Family
from distill.engine.spec import ModelSpec

ROUTER = Router("softmax", "best", ("greedy", "group_limited_greedy"), correction_bias=False, normalise=False)


def read(config: Config) -> ModelSpec:
    """The spec of a V2 config. `norm_topk_prob` is refused: the published code ignores it."""
    config.only("norm_topk_prob", (False,))
    return read_deepseek(config, "deepseek_v2", ROUTER)


FAMILY = Family("deepseek_v2", read, has_experts=True)
