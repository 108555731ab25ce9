"""`plan.json`: what a recipe was expected to take. `distill plan` writes it, the report compares it with the run."""

from distill.artefacts import Artefact


class Expected(Artefact):
    """An estimate, with the ends of its 95 % interval where it comes from a sample."""

    value: float
    low: float | None = None
    high: float | None = None

    def times(self, factor: float) -> "Expected":
        """The estimate in another unit."""
        ends = (None if end is None else end * factor for end in (self.low, self.high))
        return Expected(value=self.value * factor, **dict(zip(("low", "high"), ends, strict=True)))


class Measured(Artefact):
    """The speed and prompts of a pilot. rate: completion tokens per second, all requests together. at_once: sequences
    under way at most. prompt_tokens: mean per prompt; None where the server does not count them. settings: digest
    of the recipe's generate settings; None in a plan of an earlier version."""

    rate: float
    at_once: int
    prompt_tokens: float | None
    settings: str | None = None


class Pilot(Artefact):
    """The samples of finished pilots: all samples below `samples` of these prompts (ids). population: digest of the ids
    of all prompts, from which they were drawn at random."""

    prompts: tuple[str, ...]
    samples: int
    population: str

    def joined(self, earlier: "Pilot | None") -> "Pilot":
        """This pilot with an earlier one from the same prompts: both were drawn without regard to lengths."""
        if earlier is None or earlier.population != self.population:
            return self
        prompts = tuple(dict.fromkeys((*earlier.prompts, *self.prompts)))
        return self.model_copy(update={"prompts": prompts, "samples": min(earlier.samples, self.samples)})


class StagePlan(Artefact):
    """The expected figures of one stage. tokens: completion tokens, or tokens that training reads.

    money: in the plan's `currency`. disk: bytes.
    """

    stage: str
    tokens: Expected | None = None
    hours: Expected | None = None
    money: Expected | None = None
    disk: Expected | None = None


class Judgements(Artefact):
    """What a judge is asked. filter, train, eval: judgements. prompt_tokens, completion_tokens: of each, as the
    `stored` judgements have on average, or assumed where none is stored. money: of all, in `currency`; None without a
    price."""

    filter: int
    train: int = 0
    eval: int
    prompt_tokens: float
    completion_tokens: float
    stored: int
    money: float | None = None
    currency: str = ""

    @property
    def count(self) -> int:
        """All judgements."""
        return self.filter + self.train + self.eval


class Plan(Artefact):
    """`plan.json`: what a recipe was expected to take.

    basis: what the tokens are estimated from. mean_tokens: per trace. prompt_tokens: of all requests. price: where and
    when the price of tokens is from; None without one. input_price, output_price: per million tokens. pilot: None
    before one has finished. judgements: None without a judge; their money is not part of the stages'.
    """

    traces: int
    mean_tokens: float
    basis: str
    prompt_tokens: float
    price: str | None
    currency: str
    input_price: float | None = None
    output_price: float | None = None
    measured: Measured | None
    pilot: Pilot | None = None
    judgements: Judgements | None = None
    stages: tuple[StagePlan, ...]
