"""How an engine is set up, and how tokens are drawn: two frozen dataclasses that are passed whole.

A recipe's settings become them once (backends/local.py), an engine takes them as they are, and an engine in another
process gets them as one JSON message. The file imports no torch: a setting is checked before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16"]
CacheDtype = Literal["auto", "fp8"]

MOST_TOKENS = 2**31 - 1  # of a context, a step, a cache or a draw: counted in 32 bits by the kernels


@dataclass(frozen=True)
class EngineOptions:
    """How a model is loaded and run.

    device: "cpu" or "cuda", perhaps with a number (default: a GPU that multiplies FP8, if there is one).
    dtype: of activations, cache, and weights once dequantised.
    max_batch: sequences decoded at once. max_step_tokens: prompt tokens computed per step.
    page_size: tokens (default: 64 on a GPU, else 16).
    cache_tokens: size of the key-value cache (default: what max_batch full contexts can use, but at most a fifth of the
    budget, or without one 512 MiB or one context, whichever is larger; a shorter one makes max_context
    shorter).
    max_context: tokens of prompt and completion together (default and upper limit: the model's).
    num_speculative_tokens: tokens that the checkpoint's draft layer proposes at a time (faster where few sequences
    decode; the text is the same).
    memory_budget: bytes for weights, cache and one step's activations together (default: most of a GPU's free memory;
    on a CPU, no limit); experts that do not fit are streamed, from the files or, to a GPU, from the host's memory.
    resident_experts: how many experts of each layer to keep in memory, instead of a budget.
    kv_cache_dtype: "fp8" quantises cached latents, which halves them (GPU).
    kernels: a column of the table of ops (default: the device's).
    Errors: ValueError naming the option, for a value that no model allows.
    """

    device: str | None = None
    dtype: Dtype = "float32"
    max_batch: int = 256
    max_step_tokens: int = 2048
    page_size: int | None = None
    cache_tokens: int | None = None
    max_context: int | None = None
    num_speculative_tokens: int = 0
    memory_budget: int | None = None
    resident_experts: int | None = None
    kv_cache_dtype: CacheDtype = "auto"
    kernels: str | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("max_batch", self.max_batch),
            ("max_step_tokens", self.max_step_tokens),
            ("page_size", self.page_size),
            ("cache_tokens", self.cache_tokens),
        ):
            if value is not None and not 1 <= value <= MOST_TOKENS:
                raise ValueError(f"{name} is {value}; it must be from 1 to {MOST_TOKENS}")
        for name, text, allowed in (("dtype", self.dtype, Dtype), ("kv_cache_dtype", self.kv_cache_dtype, CacheDtype)):
            if text not in get_args(allowed):
                raise ValueError(f"{name} is {text!r}; it must be {' or '.join(get_args(allowed))}")
        if self.num_speculative_tokens < 0:
            raise ValueError(f"num_speculative_tokens is {self.num_speculative_tokens}; it must be 0 or more")


@dataclass(frozen=True)
class ThinkTokens:
    """How a model thinks, in tokens. opened: whether the prompt has opened the block. begin: opens it, None where no
    single token does. end: closes it. closing: what is written to close it, `end` among it."""

    opened: bool
    begin: int | None
    end: int
    closing: tuple[int, ...]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    temperature: 0 is greedy. top_p: nucleus, 1 is off. top_k: 0 is off. stop_token_ids: tokens that end a sample.
    logprobs: how many of the largest raw log-probabilities to return beside each generated token; None for none.
    thinking_budget: completion tokens after which an open think block is closed; None for no limit. think_tokens: what
    the budget needs to know of the model.
    Errors: ValueError naming the parameter.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    thinking_budget: int | None = None
    think_tokens: ThinkTokens | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1 = off)")
        if not 0 <= self.top_k <= MOST_TOKENS:
            raise ValueError(f"top_k is {self.top_k}; it must be from 0 (off) to {MOST_TOKENS}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.thinking_budget is not None and self.thinking_budget < 1:
            raise ValueError(f"thinking_budget is {self.thinking_budget}; it must be at least 1, or None")
        if self.logprobs is not None and self.logprobs < 1:
            raise ValueError(f"logprobs is {self.logprobs}; it must be at least 1, or None")

    def forced(self, completion: Sequence[int]) -> int | None:
        """The token that follows these of a completion because the thinking budget is used up, if one does."""
        budget, think = self.thinking_budget, self.think_tokens
        if budget is None or think is None or not 0 <= (place := len(completion) - budget) < len(think.closing):
            return None
        thought = completion[:budget]
        if think.end in thought or not (think.opened or think.begin in thought):
            return None
        return think.closing[place]
