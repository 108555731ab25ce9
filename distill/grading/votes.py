"""Which answers to a problem are equal: consensus counts `1/2`, `\\frac12` and `0.5` together.

Answers that are spelled alike are equal without further comparison. Every two of the others are compared as an answer
is with the gold answer, by the same workers, and answers that are connected by equalities form a class. A sample votes
with the answer that it marked as final; a guess from its last line is no vote.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import combinations
from typing import TypeVar

from distill.grading import Grader
from distill.grading.math import normalise

P = TypeVar("P", bound=Hashable)

LONGEST = 200  # characters: a longer answer is prose, which is compared by its spelling


def classes(grader: Grader, answers: Mapping[P, Iterable[str]]) -> Iterator[tuple[P, dict[str, int]]]:
    """For each problem, yield the number of the class of each of its answers; 0 is the first answer's class."""
    for problem, texts in answers.items():
        spelled: dict[str, list[str]] = {}
        for text in texts:
            spelled.setdefault(normalise(text), []).append(text)
        parent = {spelling: spelling for spelling in spelled}

        def root(spelling: str, parent: dict[str, str] = parent) -> str:
            while parent[spelling] != spelling:
                spelling = parent[spelling]
            return spelling

        short = [spelling for spelling in spelled if len(spelling) <= LONGEST]
        pairs = [((a, b), spelled[a][0], spelled[b][0]) for a, b in combinations(short, 2)]
        for (a, b), equal in grader.same(pairs):
            if equal:
                parent[root(b)] = root(a)
        numbers: dict[str, int] = {}
        result: dict[str, int] = {}
        for spelling, spellings in spelled.items():
            number = numbers.setdefault(root(spelling), len(numbers))
            result |= dict.fromkeys(spellings, number)
        yield problem, result
