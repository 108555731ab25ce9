"""`price:` of a teacher: what a provider charges for tokens, with the day on which it did."""

from typing import Literal

from pydantic import Field

from distill.recipe.sources import Day
from distill.section import Section


class Price(Section):
    """A provider's price list. Amounts are per million tokens."""

    input: float = Field(ge=0, description="price of a million prompt tokens")
    output: float = Field(ge=0, description="price of a million completion tokens, reasoning included")
    cached_input: float | None = Field(
        None, ge=0, description="price of a million prompt tokens from the provider's cache; not used in estimates"
    )
    currency: Literal["USD", "EUR", "CNY"] = Field("USD", description="currency of the amounts")
    date: Day = Field(description="day on which the price was valid, such as 2025-01-20")
    source: str = Field(description="where the price is from")

    def cost(self, prompt_tokens: float, completion_tokens: float, cached_tokens: float = 0) -> float:
        """The price of these tokens, in `currency`. cached_tokens: among those of the prompts."""
        cached_tokens = min(cached_tokens, prompt_tokens)  # a server may count more
        cached = self.input if self.cached_input is None else self.cached_input
        prompts = (prompt_tokens - cached_tokens) * self.input + cached_tokens * cached
        return (prompts + completion_tokens * self.output) / 1e6
