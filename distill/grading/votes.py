"""Classes of equal answers to a problem: consensus counts `1/2`, `\\frac12` and `0.5` as one answer.

Answers with the same spelling are equal without further comparison. All other pairs are compared by the grading
workers, as an answer is compared with the gold answer. An answer joins the first class whose members all equal it.
Equality is not transitive (50 % equals 0.5, and 50 % in an answer may also mean 50), so a weaker rule would put 0.5 and
50 into one class. A sample votes with the answer that it marks as final; a guess from prose has no vote.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import combinations
from typing import TypeVar

from distill.grading import Grader
from distill.grading.math import normalise

P = TypeVar("P", bound=Hashable)

LONGEST = 200  # characters; a longer answer is prose and is compared by spelling only


def classes(grader: Grader, answers: Mapping[P, Iterable[str]]) -> Iterator[tuple[P, dict[str, int]]]:
    """Yield (problem, answer → number of its class) for each problem. The first answer is in class 0."""
    for problem, texts in answers.items():
        spelled: dict[str, list[str]] = {}
        for text in texts:
            spelled.setdefault(normalise(text), []).append(text)
        short = [spelling for spelling in spelled if len(spelling) <= LONGEST]
        pairs = [((a, b), spelled[a][0], spelled[b][0]) for a, b in combinations(short, 2)]
        equal = {pair for pair, same in grader.same(pairs) if same}
        members: list[list[str]] = []
        result: dict[str, int] = {}
        for spelling, spellings in spelled.items():
            joined = (n for n, others in enumerate(members) if all((other, spelling) in equal for other in others))
            number = next(joined, len(members))
            if number == len(members):
                members.append([])
            members[number].append(spelling)
            result |= dict.fromkeys(spellings, number)
        yield problem, result
