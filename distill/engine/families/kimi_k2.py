"""Kimi K2: DeepSeek-V3's layers and router under a name of its own. K2-Thinking has experts in INT4.

Published is a tiktoken.model in place of a tokenizer.json, and code that says how text is split before it is encoded.
That code is not run: the pattern stands here.
"""

from __future__ import annotations

from distill.engine.config import Config
from distill.engine.families.deepseek import read_deepseek
from distill.engine.families.deepseek_v3 import ROUTER
from distill.engine.families.family import Family
from distill.engine.spec import ModelSpec

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"  # of scripts without case: in both
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT = (
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)


def read(config: Config) -> ModelSpec:
    """The spec of a Kimi K2 config."""
    return read_deepseek(config, "kimi_k2", ROUTER)


# Of K2-Thinking, whose card has weights; K2 and K2-Instruct are published in FP8, a byte each.
FAMILY = Family("kimi_k2", read, split=SPLIT, published_bytes=0.6, has_experts=True)
