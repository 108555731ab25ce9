"""Select k traces of each prompt, so that easy prompts do not crowd out hard ones.

`random` draws by a hash of (seed, prompt, sample): the choice does not depend on the order in which traces were
finished, and raising k or adding samples keeps as much of the earlier choice as can be kept.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from distill.filters.base import OK, Group, GroupFilter, PromptGroup, Resources
from distill.filters.judged import Judged, common_unit
from distill.traces.trace import Verdict


class Select(GroupFilter):
    """Keep at most `per_prompt` traces of each prompt."""

    per_prompt: int = Field(ge=1, description="number of traces of a prompt to keep")
    order: Literal["first", "shortest", "random"] = Field(
        "first", description="which traces to keep: the first samples, the shortest, or a random choice"
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
    )

    @property
    def draws(self) -> bool:
        """Whether its verdicts depend on the recipe's seed."""
        return self.order == "random"

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
        if self.order == "shortest":
            unit = common_unit(group)
            return sorted(group, key=lambda trace: (trace.length(unit), trace.key[1]))
        return sorted(group, key=lambda trace: trace.key[1])
