"""Rewards of rollouts: a ledger beside the traces, whose rows name the rollout by its key.

    {"prompt": "9e…", "sample": 12, "value": 1.0, "correct": true, "parts": {"correct": 1.0, "length": 0.0}}

`distill.train.rollouts.rewards` defines the parts; what reads a run's rollouts needs the numbers only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distill.errors import UserError
from distill.traces.keys import Key
from distill.traces.ledger import Ledger, Row

REWARDS = "rewards.jsonl"  # in the directory of the rollouts


@dataclass(frozen=True)
class Reward:
    """The reward of one rollout.

    value: the weighted sum of the parts; None if the rollout is unverifiable. correct: the grader's verdict; None if it
    has none, or was not asked because its weight is 0. parts: unweighted, by name, of the parts with a weight.
    """

    value: float | None
    correct: bool | None
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Such as `reward 1.2: correct 1, format 0.2`."""
        value = "no reward: unverifiable" if self.value is None else f"reward {self.value + 0.0:.4g}"  # no -0
        parts = ", ".join(f"{name} {part + 0.0:.4g}" for name, part in self.parts.items())
        return f"{value}{': ' if self.value is not None and parts else '; ' if parts else ''}{parts}"

    @property
    def grade(self) -> str:
        """The grader's verdict, where the reward is not trained on: `correct`, `wrong` or `unverifiable`."""
        return "unverifiable" if self.correct is None else "correct" if self.correct else "wrong"

    def to_row(self, key: Key) -> Row:
        """The row of the rollout with this key."""
        prompt, sample = key
        parts = dict(self.parts)
        return {"prompt": prompt, "sample": sample, "value": self.value, "correct": self.correct, "parts": parts}


def read_rewards(path: Path) -> Iterator[tuple[Key, Reward]]:
    """The rewards in a ledger, the first one of each rollout; none without a file. Errors: UserError for a row that is
    no reward."""
    seen: set[Key] = set()
    for number, row in enumerate(Ledger(path).rows(), 1):
        match row:
            case {
                "prompt": str(prompt),
                "sample": int(sample),
                "value": None | float() | int() as value,
                "correct": None | bool() as correct,
                "parts": dict(parts),
            }:
                if (prompt, sample) not in seen:
                    seen.add((prompt, sample))
                    yield (prompt, sample), Reward(value, correct, parts)
            case _:
                raise UserError(f"{path}, row {number}: not a reward; move the file away")
