"""Local inference for every DeepSeek generation and for dense Llama and Qwen checkpoints: token ids in, token ids out.

Names are resolved on first use, because reading a `ModelSpec` (planning does) must not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.engine.engine import Completion, Engine
    from distill.engine.sampler import SamplingParams
    from distill.engine.scheduler import Request
    from distill.engine.score import Scores
    from distill.engine.spec import ModelSpec
    from distill.engine.workers import EngineDied, Engines

_HOME = {
    "Completion": "engine",
    "Engine": "engine",
    "EngineDied": "workers",
    "Engines": "workers",
    "EngineOptions": "options",
    "EngineUsage": "engine",
    "ModelSpec": "spec",
    "Request": "scheduler",
    "SamplingParams": "options",
    "Scores": "score",
}

__all__ = ["Completion", "Engine", "EngineDied", "Engines", "ModelSpec", "Request", "SamplingParams", "Scores"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"distill.engine.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
