"""Chains of additions and subtractions: problems that need reasoning, for a pair of models that fits into a repository.

A problem is a start and 2 to 5 signed steps whose running value stays within 0…99, asked as an expression ("Compute 23
+ 45 - 12.") or as a short story with one step per day. One step is a fact that a small model can know by heart; a chain
is not, because there are far more chains than the model has parameters. So a model has to reason step by step to
answer, which is what distillation should teach. No operand occurs twice in a problem and no day in a story, so that a
model finds the next step by looking for the one that it has just written; without this, most of the training time is
spent on learning to count.

A hash of the *multiset* of signed operands separates held-out from training problems, so that reordering a held-out
problem does not make it a training problem. Because a worked chain also shows every chain inside it, a training problem
has no held-out window either, neither in its expression (consecutive operands) nor in its working (consecutive steps).
`tools/prove_heldout.py` checks the texts themselves. The split `longer` has chains of 6 to 8 steps, more than any
training text, so that none can contain such a chain; they are asked as expressions, because stories have five days.

Standard library only: the maintainers' tools import this on machines where only torch is installed.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

MAX_VALUE = 99
MIN_STEPS, MAX_STEPS = 2, 5
STEPS = {"train": (MIN_STEPS, MAX_STEPS), "heldout": (MIN_STEPS, MAX_STEPS), "longer": (MAX_STEPS + 1, MAX_STEPS + 3)}
HELDOUT_SHARE = 40  # one chain in forty
STORY_SHARE = 0.5

Chain = tuple[int, ...]  # signed operands; the first is the start


@dataclass(frozen=True)
class Problem:
    """A problem. chain: the start, then signed operands. question: as a user would ask it."""

    chain: Chain
    question: str

    @property
    def values(self) -> tuple[int, ...]:
        """The running value after the start and after each step: len(chain) numbers, all within 0…99."""
        return running_values(self.chain)

    @property
    def answer(self) -> str:
        """The gold answer, in digits."""
        return str(self.values[-1])

    @property
    def expression(self) -> str:
        """The chain as an expression: `23 + 45 - 12`."""
        return expression(self.chain)

    @property
    def steps(self) -> list[str]:
        """The working, one equation a step: `23 + 45 = 68`."""
        values = self.values
        return [f"{expression((values[i], step))} = {values[i + 1]}" for i, step in enumerate(self.chain[1:])]


def running_values(chain: Chain) -> tuple[int, ...]:
    """The partial sums of a chain, its start first."""
    total, values = 0, []
    for operand in chain:
        total += operand
        values.append(total)
    return tuple(values)


def expression(chain: Chain) -> str:
    """A chain as an expression: `23 + 45 - 12`."""
    head, *rest = chain
    return str(head) + "".join(f" {'+' if n > 0 else '-'} {abs(n)}" for n in rest)


@lru_cache(maxsize=1 << 18)
def _heldout_key(key: Chain) -> bool:
    digest = hashlib.sha256(",".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELDOUT_SHARE == 0


def is_heldout(chain: Chain) -> bool:
    """Whether this chain, in any order of its operands, belongs to the held-out problems."""
    return _heldout_key(tuple(sorted(chain)))


def windows(chain: Chain) -> Iterator[Chain]:
    """Every chain of at least MIN_STEPS steps that a text about `chain` shows, `chain` itself first."""
    values = running_values(chain)
    yield chain
    for begin in range(len(chain)):
        for end in range(begin + MIN_STEPS + 1, len(chain) + 1):
            yield (values[begin], *chain[begin + 1 : end])  # as the working shows it
            yield (abs(chain[begin]), *chain[begin + 1 : end])  # as the expression shows it


def belongs(chain: Chain, split: str) -> bool:
    """Whether a chain belongs to a split. Train: no window is held out; heldout: the chain itself is; longer: all that
    have more steps than those two."""
    if split == "longer":
        return len(chain) - 1 > MAX_STEPS
    if split == "heldout":
        return is_heldout(chain)
    return not any(is_heldout(window) for window in windows(chain))


def draw_chain(rng: random.Random, split: str) -> Chain:
    """One chain of the split, no operand twice; each step's result is uniform, so that all facts are equally common."""
    while True:
        value = rng.randint(1, MAX_VALUE)
        chain = [value]
        for _ in range(rng.randint(*STEPS[split])):
            result = rng.randint(0, MAX_VALUE - 1)
            result += result >= value  # uniform over everything but `value`: no step is zero
            chain.append(result - value)
            value = result
        if len({abs(n) for n in chain}) == len(chain) and belongs(tuple(chain), split):
            return tuple(chain)


NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry")
ITEMS = ("apples", "books", "coins", "stamps", "marbles", "cards", "shells", "pencils")
GAINS = ("buys {n} more", "finds {n} more", "gets {n} from a friend", "wins {n} more")
LOSSES = ("gives away {n}", "loses {n}", "sells {n}", "drops {n}")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
ASKS = ("What is {e}?", "Compute {e}.", "Calculate {e}.", "How much is {e}?")


def story(chain: Chain, rng: random.Random) -> str:
    """A chain as a short story, one step per day."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    parts = [f"{name} has {chain[0]} {item}."]
    for day, operand in zip(DAYS, chain[1:], strict=False):
        verb = rng.choice(GAINS if operand > 0 else LOSSES).format(n=abs(operand))
        parts.append(f"On {day} {name} {verb}.")
    parts.append(f"How many {item} does {name} have now?")
    return " ".join(parts)


def draw_problem(rng: random.Random, split: str, story_share: float = STORY_SHARE) -> Problem:
    """One problem: a story with probability `story_share`, else an expression; of `longer` always an expression."""
    chain = draw_chain(rng, split)
    if split != "longer" and rng.random() < story_share:
        return Problem(chain, story(chain, rng))
    return Problem(chain, rng.choice(ASKS).format(e=expression(chain)))


def problems(split: str, seed: int, limit: int) -> Iterator[Problem]:
    """The first `limit` problems of a split, no two with the same operands. Longer limits extend shorter ones."""
    assert split in STEPS, split
    rng = random.Random(f"arithmetic/{split}/{seed}")
    seen: set[Chain] = set()
    while len(seen) < limit:
        problem = draw_problem(rng, split)
        key = tuple(sorted(problem.chain))
        if key not in seen:
            seen.add(key)
            yield problem
