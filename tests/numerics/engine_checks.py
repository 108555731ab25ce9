"""How the numerics tests look into an engine: its logits by any cut of the tokens, and the error they are held to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.engine import Engine, EngineOptions
from distill.engine.batch import Chunk


def some_tokens(count: int, vocab: int = 300, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(vocab), k=count)


def engine_options(dtype: torch.dtype = torch.float32, **values: Any) -> EngineOptions:
    """`EngineOptions`, with a torch dtype, which tests compare with."""
    return EngineOptions(dtype="bfloat16" if dtype == torch.bfloat16 else "float32", **values)


@torch.inference_mode()
def engine_logits(
    engine: Engine, tokens: list[int], cuts: Sequence[int] = (), decode_from: int | None = None
) -> Tensor:
    """[t, vocabulary] float32: prefilled in chunks that end at `cuts`, then one token a step from `decode_from` on."""
    prefilled = len(tokens) if decode_from is None else decode_from
    pages = engine._pages.allocate(engine._pages.pages_for(len(tokens)))
    (slot,) = engine._slots.allocate(1) if engine._slots else [-1]
    ends = [*cuts, prefilled]
    parts = []
    for start, end in zip([0, *cuts], ends, strict=True):
        parts.append(engine._forward([], [Chunk(tokens[start:end], start, pages, slot)]))
    for position in range(prefilled, len(tokens)):
        parts.append(engine._forward([Chunk(tokens[position : position + 1], position, pages, slot)], []))
    engine._pages.release(pages)
    if engine._slots:
        engine._slots.release([slot])
    return engine._model.logits(torch.cat(parts))


def relative_error(ours: Tensor, theirs: Tensor) -> tuple[float, str]:
    """Largest difference over the largest logit, and a line with what a failure should print."""
    difference = (ours - theirs).abs()
    error = (difference.max() / theirs.abs().max()).item()
    return error, f"max {difference.max():.3g}, mean {difference.mean():.3g}, largest logit {theirs.abs().max():.3g}"
