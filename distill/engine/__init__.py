"""Local inference for every DeepSeek generation and for dense Llama and Qwen checkpoints: token ids in, token ids out.

Names are resolved on first use, because reading a `ModelSpec` (planning does) must not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.engine.engine import Engine
    from distill.engine.numerics import Numerics
    from distill.engine.options import EngineOptions, SamplingParams
    from distill.engine.results import Completion, EngineUsage
    from distill.engine.sampler import NonFiniteLogits
    from distill.engine.scheduler import Request
    from distill.engine.score import Scores
    from distill.engine.spec import ModelSpec
    from distill.engine.workers import EngineDied, Engines

_HOME = {
    "Completion": "results",
    "Engine": "engine",
    "EngineDied": "workers",
    "EngineOptions": "options",
    "EngineUsage": "results",
    "Engines": "workers",
    "ModelSpec": "spec",
    "NonFiniteLogits": "sampler",
    "Numerics": "numerics",
    "Request": "scheduler",
    "SamplingParams": "options",
    "Scores": "score",
}

__all__ = [
    "Completion",
    "Engine",
    "EngineDied",
    "EngineOptions",
    "EngineUsage",
    "Engines",
    "ModelSpec",
    "NonFiniteLogits",
    "Numerics",
    "Request",
    "SamplingParams",
    "Scores",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"distill.engine.{_HOME[name]}"), name)
    return value
