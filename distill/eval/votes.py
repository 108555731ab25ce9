"""Which answers of a problem are one answer: consensus counts `1/2`, `\\frac12` and `0.5` together.

Answers that are spelled the same are one without a look. Of the others every two are compared as an answer is with the
gold one, by the same workers, and those that are connected by equalities are one answer. A sample votes with the answer
that it marked as its own; a guess from its last line is no vote.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import combinations
from typing import TypeVar

from distill.grading import Grader
from distill.grading.math import normalise

P = TypeVar("P", bound=Hashable)

LONGEST = 200  # characters: more is prose, which is compared as it is spelled


def classes(grader: Grader, answers: Mapping[P, Iterable[str]]) -> Iterator[tuple[P, dict[str, int]]]:
    """For each problem, the number of the class of each of its answers; 0 is the first answer's."""
    for problem, of_one in answers.items():
        spelled: dict[str, list[str]] = {}
        for answer in of_one:
            spelled.setdefault(normalise(answer), []).append(answer)
        parent = {spelling: spelling for spelling in spelled}

        def root(spelling: str, parent: dict[str, str] = parent) -> str:
            while parent[spelling] != spelling:
                spelling = parent[spelling]
            return spelling

        short = [spelling for spelling in spelled if len(spelling) <= LONGEST]
        pairs = [((one, other), spelled[one][0], spelled[other][0]) for one, other in combinations(short, 2)]
        for (one, other), equal in grader.same(pairs):
            if equal:
                parent[root(other)] = root(one)
        numbers: dict[str, int] = {}
        found: dict[str, int] = {}
        for spelling, spellings in spelled.items():
            number = numbers.setdefault(root(spelling), len(numbers))
            found |= dict.fromkeys(spellings, number)
        yield problem, found
