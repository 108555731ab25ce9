"""Decontamination: prompts that are problems of a benchmark, word for word or rephrased.

A student that has seen the problems of its evaluation has scores that mean nothing. Copies are found by their n-grams,
rephrasings by the terms that a rephrasing keeps (`distill.filters.overlap`), offline, without a model.

`THRESHOLD` was chosen on 200 problems of GSM8K that a language model had rephrased, and 1,000 problems of its training
set as negatives, against all 1,319 items of its test set: there it finds 95.5 % at 0.7 % false positives, and 98.0 % of
199 other rephrasings. Most of the false positives are problems from the same mould. Rejected: n-grams alone, which find
none of these rephrasings; a language model as a judge of candidates, which needs a teacher to filter offline.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import ClassVar

from pydantic import Field

from distill.filters.base import OK, Candidate, Example, Resources, TraceFilter
from distill.filters.overlap import Index, Match
from distill.traces.trace import Verdict

THRESHOLD = 0.53
PROMPTS = 8192  # whose matches are remembered: the samples of a prompt come at about the same time
QUESTION = "What is the sum of 20 and 22?"  # the question that the examples answer


class Decontaminate(TraceFilter):
    """Drop traces whose prompt is a problem of a benchmark: a copy of it, or the same problem in other words."""

    benchmarks: tuple[str, ...] = Field(
        (), description="benchmark cards (names or paths) or files with questions; none: those of eval.benchmarks"
    )
    threshold: float = Field(
        THRESHOLD,
        gt=0,
        le=1,
        description="score of shared numbers, names and words from which a prompt counts as rephrased; 1: copies only",
    )

    name = "decontaminate"
    version = 4  # a problem of one or two words is a copy where it is the whole prompt
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "the prompt is no problem of these benchmarks",
        "copied": "the prompt contains the text of a problem",
        "rephrased": "the prompt has the numbers, names and rare words of a problem",
    }
    examples = (  # of the question above
        Example("copied", "<think>a</think>42", {"benchmarks": (QUESTION,)}),
        Example("copied", "<think>a</think>42", {"benchmarks": (QUESTION,), "threshold": 1.0}),
        Example("rephrased", "<think>a</think>42", {"benchmarks": ("Add 20 and 22, and give the sum.",)}),
        Example(OK, "<think>a</think>42", {"benchmarks": ("Add 20 and 22, and give the sum.",), "threshold": 1.0}),
        Example(OK, "<think>a</think>42", {"benchmarks": ("What is the sum of 21 and 42?", "Add 7 and 9.")}),
        Example(OK, "<think>a</think>42"),
    )

    def check(self, resources: Resources) -> None:
        """Read the benchmarks. Errors: UserError when one cannot be read."""
        self._matches(resources)

    def judge(self, candidate: Candidate) -> Verdict:
        """Look for the problem most like the prompt. The evidence has it, with score and shared terms."""
        asked = "\n".join(m["content"] for m in candidate.trace.prompt.messages if m["role"] == "user")
        match = self._matches(candidate.resources)(asked)
        if match is None:
            return self.verdict(OK, score=0.0)
        reason = "copied" if match.verbatim else "rephrased" if match.score >= self.threshold else OK
        shared = {kind: terms for kind, terms in match.shared.items() if terms}
        evidence = {"item": match.item.name, "score": round(match.score, 3), "shared": shared}
        if reason != OK:
            evidence["question"] = match.item.question[:300]
        return self.verdict(reason, **evidence)

    def _matches(self, resources: Resources) -> Callable[[str], Match | None]:
        def make() -> Callable[[str], Match | None]:
            return lru_cache(maxsize=PROMPTS)(Index(resources.benchmark_items(self.benchmarks)).best)

        return resources.once(f"{self.name} {self.benchmarks}", make)
