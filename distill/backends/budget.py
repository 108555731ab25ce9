"""What a run may spend on samples: admission before a request, not regret after it.

A sample is admitted only if all that was used, all that the samples under way may still use, and all that it may use
itself stay within the budget. It may use the bound of its prompt and its whole token limit; when it finishes, what it
did not use is free again. So a budget holds whatever finishes when, and near its end fewer requests are under way. A
token of every tokenizer in use has at least one byte, which bounds a prompt without a tokenizer.

What was used is what the stored traces say, so that it survives a kill: the samples that were under way are forgotten,
as nobody knows what became of them. A count that a server does not give, or gives as 0 beside a text, is taken as its
bound. An attempt that fails after its answer had begun is used up too, and repeated only where that fits. It leaves no
trace, so its tokens are handed to `on_loss`, which stores them for later sessions.

Time has no such bound. No sample is admitted that would end too late if it took as long as the longest so far. At the
deadline the backend stops waiting, whatever a server does: samples under way are lost, finished ones are stored.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.prompts.prompt import Prompt
from distill.recipe import Budget, Price
from distill.traces.trace import REFUSED, Trace

if TYPE_CHECKING:
    from distill.traces.store import TraceStore

TEMPLATE_TOKENS = 256  # that a chat template may add to a prompt
TOLERANCE = 1e-9  # of money: sums of floating-point numbers

Key = tuple[str, int]


@dataclass(frozen=True)
class Spent:
    """Tokens. cached: among those of the prompts."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.prompt + other.prompt, self.completion + other.completion, self.cached + other.cached)

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.prompt - other.prompt, self.completion - other.completion, self.cached - other.cached)

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt + self.completion


def bound_of(prompt: Prompt, max_new_tokens: int) -> Spent:
    """The most that one sample of a prompt can use."""
    size = sum(len(message["content"].encode(errors="surrogatepass")) for message in prompt.messages)
    return Spent(size + TEMPLATE_TOKENS, max_new_tokens)


def spent_on(store: "TraceStore", prompts: Mapping[str, Prompt], max_new_tokens: int) -> Spent:
    """The tokens of all stored traces. prompts: by id, for the bounds of counts that are not known."""
    total = Spent()
    for figures in store.figures():
        if figures.finish_reason == REFUSED:
            continue
        prompt = prompts.get(figures.key[0])
        bound = bound_of(prompt, max_new_tokens) if prompt else Spent(TEMPLATE_TOKENS, max_new_tokens)
        prompt_tokens = figures.prompt_tokens or bound.prompt
        cached = min(figures.cached_tokens, prompt_tokens)  # sums of larger ones would hide the prompts of other traces
        total += Spent(prompt_tokens, figures.tokens if figures.counted else bound.completion, cached)
    return total


class Allowance:
    """What may still be spent. used: tokens before this session. seconds: worked before it. price: of tokens; hourly:
    price of an hour of this machine, for a teacher that is here. on_loss: called with the tokens of each attempt that
    failed after its answer had begun. clock: seconds, for tests."""

    def __init__(
        self,
        budget: Budget,
        max_new_tokens: int,
        used: Spent,
        seconds: float,
        price: Price | None = None,
        hourly: float | None = None,
        on_loss: Callable[[Spent], None] = lambda spent: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget, self.used, self._price, self._hourly = budget, used, price, hourly
        self._on_loss = on_loss
        self._limit, self._clock, self._began = max_new_tokens, clock, clock() - seconds
        self._under_way: dict[Key, tuple[Spent, float]] = {}
        self._reserved = Spent()
        self._longest = 0.0  # seconds of a sample

    @property
    def seconds(self) -> float:
        """Worked so far, earlier sessions included."""
        return self._clock() - self._began

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.seconds >= self._most_seconds

    @property
    def deadline(self) -> float:
        """When the time is up, as `clock` counts it; infinite without a limit of time."""
        return self._began + self._most_seconds

    def fits(self, prompt: Prompt) -> bool:
        """Whether a sample of this prompt would be admitted."""
        total = self.used + self._reserved + bound_of(prompt, self._limit)
        return self._affords(total) and self.seconds + self._longest < self._most_seconds

    def shortfall(self, prompt: Prompt) -> str | None:
        """What is wrong where the whole budget does not allow for one sample of this prompt, else None."""
        bound = bound_of(prompt, self._limit)
        if self._affords(bound):
            return None
        if self.budget.tokens is not None and bound.tokens > self.budget.tokens:
            return (
                f"one sample may use {bound.tokens:,} tokens, more than generate.budget.tokens ({self.budget.tokens:,})"
            )
        return f"one sample may cost {self._price_of(bound):.2g}, more than generate.budget.cost ({self.budget.cost:g})"

    def admit(self, prompt: Prompt, sample: int) -> bool:
        """Whether a sample may begin; it is then under way."""
        if not self.fits(prompt):
            return False
        bound = bound_of(prompt, self._limit)
        self._under_way[prompt.id, sample] = (bound, self._clock())
        self._reserved += bound
        return True

    def settle(self, trace: Trace) -> None:
        """A sample has finished."""
        bound, began = self._under_way.pop(trace.key)
        self._reserved -= bound
        prompt = bound.prompt if trace.prompt_tokens is None else trace.prompt_tokens
        completion = trace.completion_tokens
        if completion is None or (completion == 0 and trace.text):
            completion = bound.completion
        self.used += Spent(prompt, completion, min(trace.cached_tokens or 0, prompt))
        self._longest = max(self._longest, self._clock() - began)

    @property
    def under_way(self) -> list[Key]:
        """(prompt id, sample) of the samples that were admitted and have not finished."""
        return list(self._under_way)

    def lose(
        self,
        prompt: Prompt,
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
        samples: int = 1,
    ) -> bool:
        """Count an attempt that failed after its answer had begun: as the server counts it, else by its bound. samples:
        that the attempt asked for.

        Returns whether the samples, which are still under way, may be asked for again.
        """
        bound = bound_of(prompt, samples * self._limit)
        completion = bound.completion if completion_tokens is None else completion_tokens
        spent = Spent(prompt_tokens or bound.prompt, completion)
        self.used += spent
        self._on_loss(spent)
        return self._affords(self.used + self._reserved)

    def release(self) -> None:
        """Nothing is under way any more."""
        self._under_way.clear()
        self._reserved = Spent()

    def report(self) -> str:
        """What was used of each limit, such as `9.98 of 10 USD, 1,200 of 2,000 tokens`."""
        budget, parts = self.budget, []
        if budget.cost is not None:
            spent = self._price_of(self.used) if self._price else self.seconds / 3600 * (self._hourly or 0)
            parts.append(f"{spent:,.2f} of {budget.cost:g}{f' {self._price.currency}' if self._price else ''}")
        if budget.tokens is not None:
            parts.append(f"{self.used.tokens:,} of {budget.tokens:,} tokens")
        if budget.hours is not None:
            parts.append(f"{self.seconds / 3600:,.2f} of {budget.hours:g} hours")
        return ", ".join(parts)

    @property
    def _most_seconds(self) -> float:
        hours = [self.budget.hours] if self.budget.hours is not None else []
        if self.budget.cost is not None and self._price is None and self._hourly:
            hours.append(self.budget.cost / self._hourly)
        return min(hours, default=float("inf")) * 3600

    def _affords(self, total: Spent) -> bool:
        """Whether tokens and their price are within the budget."""
        if self.budget.tokens is not None and total.tokens > self.budget.tokens:
            return False
        return self.budget.cost is None or not self._price or self._price_of(total) <= self.budget.cost + TOLERANCE

    def _price_of(self, spent: Spent) -> float:
        assert self._price is not None
        return self._price.cost(spent.prompt, spent.completion, spent.cached)
