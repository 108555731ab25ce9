"""Agreement with the majority, where there is no gold answer: the answer that most samples reach is most often right.

Self-consistency (arXiv:2203.11171) as a filter. Equal answers count together whatever their spelling
(`distill.grading.votes`); a sample votes with the answer that it marked as final. The traces that earlier filters have
dropped do not vote. Prompts that have a gold answer are left to `correct`; where answers cannot be compared with one
another (code, chat), nothing is judged.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, JsonValue

from distill.filters.base import OK, Candidate, Corpus, CorpusFilter, Group, Resources
from distill.filters.judged import Judged, Key
from distill.section import Free
from distill.traces.trace import Verdict

if TYPE_CHECKING:
    from distill.grading import Grader

LONGEST = 200  # characters: a longer answer is prose, and is compared by its hash


class Majority(CorpusFilter):
    """Keep the traces with the most frequent answer of their prompt. Prompts with a gold answer are not judged."""

    min_share: float = Field(
        0.5, gt=0, le=1, description="share of a prompt's answers that the most frequent one needs"
    )
    min_votes: int = Field(3, ge=2, description="answers that a prompt needs for a majority")
    timeout: float = Field(5.0, gt=0, description="processor seconds for one comparison; a longer one is not equal")
    workers: Annotated[int, Free] = Field(2, ge=1, description="number of grading processes")

    name = "majority"
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "the most frequent answer; or the prompt is not judged",
        "minority": "another answer is more frequent",
        "no_majority": "no answer of the prompt is frequent enough",
        "no_answer": "no answer is marked as final",
        "too_few": "the prompt has fewer than min_votes answers",
    }
    examples = (
        Group((OK, OK, "minority"), (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{2}"), gold=None),
        Group(("no_majority",) * 4, (r"\boxed{1}", r"\boxed{1}", r"\boxed{2}", r"\boxed{2}"), gold=None),
        Group((OK, OK, OK, "no_answer"), (r"\boxed{1}", r"\boxed{1}", r"\boxed{1}", "It is hard."), gold=None),
        Group(("too_few", "too_few"), (r"\boxed{1}", r"\boxed{1}"), gold=None),
        Group((OK, OK), (r"\boxed{1}", r"\boxed{2}")),
    )

    def note(self, candidate: Candidate) -> JsonValue:
        """The final answer, "" where none is marked; None for a prompt with a gold answer or of a task without a grader
        that finds answers."""
        from distill.grading import GRADERS

        prompt = candidate.trace.prompt
        if prompt.answer or prompt.task not in ("math", "choice"):
            return None
        answer = GRADERS[prompt.task].find(candidate.trace.answer)
        if answer is None or not answer.marked:
            return ""
        text = GRADERS[prompt.task].shown(answer)
        if len(text) <= LONGEST:
            return text
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    def judge_corpus(self, corpus: Corpus, resources: Resources) -> Iterator[tuple[Key, Verdict]]:
        """Count the votes, prompt by prompt. The evidence has the answer, its votes and those of the majority."""
        from distill.grading import Grader

        with Grader(self.workers, self.timeout) as grader:
            for _, traces in groupby(corpus, lambda trace: trace.key[0]):
                group = list(traces)
                for trace, verdict in zip(group, self._verdicts(group, grader), strict=True):
                    yield trace.key, verdict

    def _verdicts(self, group: list[Judged], grader: "Grader") -> Iterator[Verdict]:
        from distill.grading.votes import classes

        if self.noted(group[0]) is None:
            yield from (self.verdict(OK, judged=False) for _ in group)
            return
        answers = [str(self.noted(trace)) for trace in group]
        voting = [answer for answer in answers if answer]
        [(_, number)] = classes(grader, {"": voting})
        votes = Counter(number[answer] for answer in voting)
        ranked = votes.most_common(2)
        is_clear = bool(ranked) and ranked[0][1] / len(voting) >= self.min_share  # exact: 11 of 20 are 0.55
        if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
            is_clear = False
        for answer in answers:
            evidence = {"answer": answer or None, "votes": votes[number[answer]] if answer else 0, "of": len(voting)}
            if len(voting) < self.min_votes:
                reason = "too_few"
            elif not answer:
                reason = "no_answer"
            elif not is_clear:
                reason = "no_majority"
            else:
                reason = OK if number[answer] == ranked[0][0] else "minority"
            yield self.verdict(reason, **evidence)
