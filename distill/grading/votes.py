"""Which answers to a problem are equal: consensus counts `1/2`, `\\frac12` and `0.5` together.

Answers that are spelled alike are equal without further comparison. Every two of the others are compared as an answer
is with the gold answer, by the same workers. An answer joins the first class of which it equals every member: equality
is not transitive (50 % is 0.5, and in an answer also 50), and 0.5 and 50 must not elect each other through a third. A
sample votes with the answer that it marked as final; a guess from prose is no vote.
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
