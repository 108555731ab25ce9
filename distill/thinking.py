"""The thinking mode of a model, as cards name it, and as chat templates and servers are asked for it.

Most models have two: with and without. DeepSeek-V4 has two levels of thinking beside answers without it. Every name
that templates have for a mode is passed, and a template reads its own: `thinking` in DeepSeek-V3.1, `enable_thinking`
in Qwen3, `reasoning_effort` for a level.
"""

from typing import Literal, TypeAlias

Thinking: TypeAlias = bool | Literal["high", "max"]
LEVELS: tuple[Literal["high", "max"], ...] = ("high", "max")


def variables(thinking: Thinking) -> dict[str, bool | str]:
    """The variables of a chat template for a mode."""
    level: dict[str, bool | str] = {"reasoning_effort": thinking} if isinstance(thinking, str) else {}
    return {"thinking": bool(thinking), "enable_thinking": bool(thinking)} | level
