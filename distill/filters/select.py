"""Select k traces of each prompt, so that easy prompts do not crowd out hard ones.

`random` draws by a hash of (seed, prompt, sample): the choice does not depend on the order in which traces were
finished, and raising k or adding samples keeps as much of the earlier choice as can be kept.

`diverse` takes the first sample, and then the sample that is least similar to those taken (farthest first, Gonzalez
1985), by MinHash over runs of three words: several ways to solve a problem instead of one way several times.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, JsonValue, model_validator

from distill.filters.base import OK, Candidate, Group, GroupFilter, PromptGroup, Resources
from distill.filters.judged import Judged, common_unit
from distill.section import Later
from distill.traces.trace import Verdict

SHINGLE, BANDS, ROWS = 3, 16, 4  # of the signatures that `diverse` compares: 64 numbers


class Select(GroupFilter):
    """Keep at most `per_prompt` traces of each prompt."""

    per_prompt: int = Field(ge=1, description="number of traces of a prompt to keep")
    order: Literal["first", "shortest", "random", "diverse", "closest"] = Field(
        "first",
        description="which traces to keep: the first samples, the shortest, a random choice, the most diverse, those "
        "with a length closest to `tokens`",
    )
    tokens: Annotated[int | None, Later] = Field(None, ge=1, description="length that `closest` looks for")
    unit: Annotated[Literal["teacher", "student"], Later] = Field(
        "teacher", description="tokenizer that measures lengths: the teacher's as sampled, or the student's"
    )

    name = "select"
    reasons: ClassVar[Mapping[str, str]] = {OK: "among the first per_prompt in the order", "surplus": "after them"}
    examples = (
        Group((OK, OK, "surplus"), ("a", "b", "c"), {"per_prompt": 2}),
        Group(
            ("surplus", OK, "surplus", OK),
            ("a", "b", "c", "d"),
            {"per_prompt": 2, "order": "shortest"},
            (50, 30, 40, 30),
        ),
        Group(("surplus", OK, "surplus"), ("a b c", "a", "a b"), {"per_prompt": 1, "order": "shortest"}),
        Group(
            ("surplus", OK, OK),
            ("a", "b", "c"),
            {"per_prompt": 2, "order": "closest", "tokens": 35},
            (50, 30, 36),
        ),
        Group(
            (OK, "surplus", OK),
            ("twenty and two is 22", "twenty and two is 22.", "two tens, two ones"),
            {"per_prompt": 2, "order": "diverse"},
        ),
    )

    @model_validator(mode="after")
    def _closest_to_a_length(self) -> "Select":
        if (self.order == "closest") != (self.tokens is not None):
            raise ValueError("`order: closest` and `tokens` need one another")
        return self

    @property
    def draws(self) -> bool:
        """Whether its verdicts depend on the recipe's seed."""
        return self.order == "random"

    @property
    def measures_student(self) -> bool:
        """Whether lengths are measured in the student's tokens."""
        return self.unit == "student" and self.order in ("shortest", "closest")

    def check(self, resources: Resources) -> None:
        """Load the student's tokenizer, where it measures. Errors: UserError when it cannot be loaded."""
        if self.measures_student:
            resources.student_tokens("")

    def note(self, candidate: Candidate) -> JsonValue:
        """The length in the student's tokens, or the signature, where the order depends on one."""
        if self.measures_student:
            return candidate.resources.student_tokens(candidate.trace.text)
        if self.order == "diverse":
            from distill.filters.minhash import MinHash

            return [int(number) for number in MinHash(SHINGLE, BANDS, ROWS).signature(candidate.trace.text)]
        return None

    def judge_group(self, group: PromptGroup, resources: Resources) -> Sequence[Verdict]:
        """Keep the first `per_prompt`; the evidence has the trace's rank (from 1)."""
        survivors = group.survivors
        rank = {trace.key: rank for rank, trace in enumerate(self._ordered(survivors, resources.seed), 1)}
        reasons = (OK if rank[trace.key] <= self.per_prompt else "surplus" for trace in survivors)
        return [
            self.verdict(reason, rank=rank[trace.key], by=self.order)
            for trace, reason in zip(survivors, reasons, strict=True)
        ]

    def _ordered(self, group: Sequence[Judged], seed: int) -> list[Judged]:
        if self.order == "random":
            return sorted(group, key=lambda t: hashlib.sha256(f"{seed}/{t.key[0]}/{t.key[1]}".encode()).digest())
        if self.order == "diverse":
            return self._farthest_first(group)
        if self.order in ("shortest", "closest"):
            unit = common_unit(group)
            target = self.tokens or 0  # lengths are positive, so that the shortest is closest to none

            def distance(trace: Judged) -> int:
                count = self.noted(trace) if self.measures_student else trace.length(unit)
                assert isinstance(count, int)
                return abs(count - target)

            return sorted(group, key=lambda trace: (distance(trace), trace.key[1]))
        return sorted(group, key=lambda trace: trace.key[1])

    def _farthest_first(self, group: Sequence[Judged]) -> list[Judged]:
        signatures = np.array([self.noted(trace) for trace in group])
        nearest = np.zeros(len(group))  # similarity to the most similar one that was taken
        order: list[int] = []
        for _ in group:
            taken = int(nearest.argmin())  # the first of several
            order.append(taken)
            nearest = np.maximum(nearest, (signatures == signatures[taken]).mean(axis=1))
            nearest[taken] = np.inf
        return [group[place] for place in order]
