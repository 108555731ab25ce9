"""An index of benchmark problems that finds the one which a prompt copies or rephrases.

Score of a pair: the weighted mean over the kinds of terms (`distill.filters.terms`) of the Dice similarity
2·shared / (prompt + item + SMOOTHING), in which a term counts by its inverse document frequency among the indexed
problems: a shared 3 says little, a shared 1,319 much. The smoothing keeps two texts with next to no terms of a kind
from being alike in it. A prompt that contains the words of a problem in their order, `VERBATIM` of its n-grams, is a
copy whatever its score: a problem inside a longer prompt, or one of fewer than n words; one of fewer than `SHORTEST`
words (`Compute $7!$.`) only where it is the whole prompt. With other operators between
the same words (`37 + 48 - 66`, `37 - 48 + 66`) it is another problem, and the score decides. But words alone make no
problem: `Which of the following is true?` is the end of a thousand others, and `Simplify √242` a step in them. So a
problem with fewer than `CONTENT` terms of its own is a copy only if the rest of the prompt asks nothing: it has no
number, and no more words than an instruction (`INSTRUCTION`).

A problem with at most `FEW_NUMBERS` numbers is identified by its names: `What is the capital of Spain?` shares all but
one term with `What is the capital of France?`. Such a problem is neither copied nor rephrased by a prompt where each of
the two has a name that the other lacks. Problems with more numbers keep their numbers when somebody else picks the
apples, so they are exempt. Names in lower case, names in scripts without capital letters, and other words that tell two
short questions apart (`gold` and `silver`, `\\sin` and `\\cos`) remain a matter of the score.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill.filters.terms import KINDS, Kind, Terms, stem_of, terms_of

WEIGHTS: dict[Kind, float] = {"numbers": 0.55, "names": 0.15, "words": 0.3}
SMOOTHING = 2.0
DOCUMENTS = (
    500  # at least so many problems are assumed when rarity is measured: in a small benchmark all terms are rare
)
GRAM = 8  # words
VERBATIM = 0.8
SHORTEST = 3  # words of a problem that is searched in longer prompts
CONTENT = 5  # terms of a problem that is searched in any prompt
INSTRUCTION = 12  # terms such as those of "Please reason step by step, and put your final answer within \\boxed{}."
GREETING = 2  # terms beside a problem that has next to none of its own
FEW_NUMBERS = 1  # of a problem that its names identify
EXAM = frozenset(  # terms of the stems of multiple choice, as `terms_of` writes them
    stem_of(word)
    for word in re.findall(
        r"\w+",
        "following true false correct incorrect right wrong best most likely least statement statements option options "
        "answer answers question choose select one describe describes example explain above below none regarding "
        "concerning except not problem solve",
    )
)
EXAM_CHARACTERS = frozenset("下列关于叙述说法正确错误的是哪项个一选以中有不属符合最为什么怎谁请问答案以及与和")


class Item(NamedTuple):
    """A problem of a benchmark. name: such as `gsm8k/17`."""

    name: str
    question: str


class Match(NamedTuple):
    """The problem that is most like a prompt. score: from 0 to 1. shared: terms as the problem spells them, the rarest
    first."""

    item: Item
    score: float
    verbatim: bool
    shared: dict[Kind, list[str]]


class Index:
    """Problems by their terms. An index of no problem matches nothing."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.items = list(items)
        self._terms = [terms_of(item.question) for item in self.items]
        lower = {word for terms in self._terms for word in terms.words - terms.names}
        self._lower = lower
        self._weights: dict[Kind, dict[str, float]] = {}
        self._places: dict[Kind, dict[str, npt.NDArray[np.intp]]] = {}
        self._sums: dict[Kind, npt.NDArray[np.float64]] = {}
        documents = max(len(self.items), DOCUMENTS)
        self._most = math.log(2 * (documents + 1))
        for kind in KINDS:
            sets = [self._kind(terms, kind) for terms in self._terms]
            frequency = Counter(term for terms in sets for term in terms)
            weights = {term: math.log((documents + 1) / (count + 0.5)) for term, count in frequency.items()}
            places: dict[str, list[int]] = defaultdict(list)
            for number, terms in enumerate(sets):
                for term in terms:
                    places[term].append(number)
            self._weights[kind] = weights
            self._places[kind] = {term: np.array(numbers) for term, numbers in places.items()}
            self._sums[kind] = np.array([sum(weights[term] for term in terms) for terms in sets])
        self._name_places, self._name_counts = self._certain_names()
        self._grams: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._gram_counts = []
        for number, item_terms in enumerate(self._terms):
            grams = _grams(item_terms.tokens)
            self._gram_counts.append(len(grams))
            for gram in grams:
                self._grams[gram].append(number)
        self._lengths = sorted({len(gram) for gram in self._grams})
        self._whole = {_whole(terms): number for number, terms in reversed(list(enumerate(self._terms)))}

    def best(self, question: str) -> Match | None:
        """The problem most like a question; None where it shares no term with any."""
        terms = terms_of(question)
        score = np.zeros(len(self.items))
        for kind in KINDS:
            mine = self._kind(terms, kind)
            shared = np.zeros(len(self.items))
            total = 0.0
            for term in mine:
                weight = self._weights[kind].get(term, self._most)
                total += weight
                if term in self._places[kind]:
                    shared[self._places[kind][term]] += weight
            score += WEIGHTS[kind] * 2 * shared / (total + self._sums[kind] + SMOOTHING)
        if not terms.numbers:  # nor has the problem: its other terms decide
            score[self._sums["numbers"] == 0] /= 1 - WEIGHTS["numbers"]
        other = self._other_names(terms)
        copied = self._whole.get(_whole(terms), self._copied(terms, other)) if question.strip() else None
        if copied is not None:
            number = copied
        else:
            score[other] = 0
            if not score.any():
                return None
            number = int(score.argmax())
        return Match(self.items[number], float(score[number]), copied is not None, self._shared(terms, number))

    def _certain_names(self) -> tuple[dict[str, npt.NDArray[np.intp]], npt.NDArray[np.intp]]:
        """The problems that their names identify: name → which of them have it, and how many names each problem has."""
        places: dict[str, list[int]] = defaultdict(list)
        counts = np.zeros(len(self.items), dtype=np.intp)
        for number, terms in enumerate(self._terms):
            if len(terms.numbers) <= FEW_NUMBERS:
                names = terms.certain_names - self._lower
                counts[number] = len(names)
                for name in names:
                    places[name].append(number)
        return {name: np.array(numbers) for name, numbers in places.items()}, counts

    def _other_names(self, terms: Terms) -> npt.NDArray[np.bool_]:
        """Which problems are about other names than the prompt, of those that their names identify, see the module."""
        mine = terms.certain_names - self._lower
        shared, known = np.zeros((2, len(self.items)), dtype=np.intp)
        for word in terms.words & self._name_places.keys():
            shared[self._name_places[word]] += 1
        for name in mine:
            for kind in ("names", "words"):
                if name in self._places[kind]:
                    known[self._places[kind][name]] += 1
        return (shared < self._name_counts) & (known < len(mine))

    def _kind(self, terms: Terms, kind: Kind) -> frozenset[str]:
        if kind == "numbers":
            return terms.numbers
        names = terms.names - self._lower
        return names if kind == "names" else terms.words - names

    def _shared(self, terms: Terms, number: int) -> dict[Kind, list[str]]:
        both = {kind: self._kind(terms, kind) & self._kind(self._terms[number], kind) for kind in KINDS}
        ranked = {
            kind: sorted(shared, key=lambda term: (-self._weights[kind][term], term)) for kind, shared in both.items()
        }
        spelled = self._terms[number].spelled
        return {kind: [spelled.get(term, term.partition("#")[0]) for term in terms] for kind, terms in ranked.items()}

    def _copied(self, terms: Terms, other: npt.NDArray[np.bool_]) -> int | None:
        """The problem whose words and operators the prompt contains in their order. other: problems that it is not."""
        counts: Counter[int] = Counter()
        tokens = terms.tokens
        for length in self._lengths:
            for gram in {tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)}:
                counts.update(self._grams.get(gram, ()))
        shares = {number: count / self._gram_counts[number] for number, count in counts.items()}
        copies = [
            number
            for number, share in shares.items()
            if share >= VERBATIM
            and not other[number]
            and self._is_whole(number, terms)
            and _same_operators(self._terms[number], terms)
        ]
        return max(copies, key=lambda number: (shares[number], -number), default=None)

    def _is_whole(self, number: int, terms: Terms) -> bool:
        """Whether a problem that a prompt contains is what the prompt asks, see the module."""
        item = self._terms[number]
        content = len(item.numbers) + sum(map(_is_content, item.words))
        if content >= CONTENT:
            return True
        rest = terms.words - item.words
        return terms.numbers <= item.numbers and len(rest) <= (INSTRUCTION if content > 1 else GREETING)


def _whole(terms: Terms) -> tuple[str, ...]:
    """A whole text, to be compared: its words and operators, or where it has none its characters."""
    return (*terms.tokens, *terms.operators()) if terms.tokens else ("".join(terms.text.split()),)


def _same_operators(item: Terms, prompt: Terms) -> bool:
    """Whether a prompt has the operators of a problem in the n-grams that both have."""
    size = min(GRAM, len(item.tokens))
    its, operators = item.operators(), prompt.operators()
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place in range(len(prompt.tokens) - size + 1):
        places[prompt.tokens[place : place + size]].append(place)
    return all(
        any(_agree(its[start : start + size + 1], operators[place : place + size + 1]) for place in places[gram])
        for start in range(len(item.tokens) - size + 1)
        if (gram := item.tokens[start : start + size]) in places
    )


def _agree(its: Sequence[str], operators: Sequence[str]) -> bool:
    """Whether the operators are the same; around the n-gram the prompt may have more."""
    return its[1:-1] == operators[1:-1] and operators[0].endswith(its[0]) and operators[-1].startswith(its[-1])


def _is_content(term: str) -> bool:
    return term not in EXAM and not EXAM_CHARACTERS.issuperset(term)


def _grams(tokens: Sequence[str]) -> set[tuple[str, ...]]:
    """The n-grams of a problem; of a shorter one, all its words."""
    if len(tokens) < GRAM:
        return {tuple(tokens)} if len(tokens) >= SHORTEST else set()
    return {tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)}
