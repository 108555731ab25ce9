"""Filters that compare traces: MinHash against exact similarities, majorities, pass rates, orders, profiles."""

import random
import unicodedata
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from filter_support import choose
from pydantic import ValidationError

from distill.catalog import load_recipe
from distill.chat import split_reasoning
from distill.errors import UserError
from distill.filters.base import ChoosingFilter, Resources
from distill.filters.dedup import Dedup
from distill.filters.index import Buckets
from distill.filters.majority import Majority
from distill.filters.minhash import ALL_PAIRS, MinHash
from distill.filters.near_answers import NearAnswers
from distill.filters.near_prompts import NearPrompts
from distill.filters.pipeline import STAGE
from distill.filters.resources import RunResources
from distill.prompts.prompt import Prompt
from distill.recipe import Recipe
from distill.recipe.filter import FILTERS, PROFILES, Filter
from distill.run import Run
from distill.section import Later
from distill.traces.store import TraceStore, read_traces
from distill.traces.trace import Trace, Verdict

WORDS = [f"word{number}" for number in range(400)]


def changed(draw: random.Random, words: list[str], changes: int) -> list[str]:
    words = list(words)
    for place in draw.sample(range(len(words)), changes):
        words[place] = draw.choice(WORDS)
    return words


def jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)


# ---- MinHash


def test_shingles() -> None:
    minhash = MinHash(shingle=2)
    assert len(minhash.shingles("a b c")) == 2 and len(minhash.shingles("a")) == 1 and not len(minhash.shingles(" \n"))
    assert set(minhash.shingles("A  b\nC")) == set(minhash.shingles("a b c"))
    assert not set(minhash.shingles("b a")) & set(minhash.shingles("a b"))
    assert len(minhash.shingles("你好吗")) == 2, "characters are words where there are no spaces"


def test_estimates_are_those_of_the_exact_similarity() -> None:
    minhash, draw = MinHash(), random.Random(0)
    errors = []
    for _ in range(150):
        words = draw.choices(WORDS, k=300)
        one, other = " ".join(words), " ".join(changed(draw, words, draw.randint(0, 60)))
        exact = jaccard(set(minhash.shingles(one).tolist()), set(minhash.shingles(other).tolist()))
        errors.append(minhash.similarity(minhash.signature(one), minhash.signature(other)) - exact)
    assert abs(np.mean(errors)) < 0.01, "no bias"
    assert np.sqrt(np.mean(np.square(errors))) < 0.5 / np.sqrt(minhash.permutations)


def test_pairs_above_the_threshold_are_found(tmp_path: Path) -> None:
    """Recall by exact similarity is that of the theory, 1 - (1 - s^rows)^bands, for every pair above 0.8."""
    minhash, draw = MinHash(), random.Random(1)
    texts = []
    for _ in range(60):
        words = draw.choices(WORDS, k=200)
        texts += [" ".join(changed(draw, words, draw.randint(0, 6))) for _ in range(4)]
    sets = [set(minhash.shingles(text).tolist()) for text in texts]
    similar = {(i, j) for i, j in combinations(range(len(texts)), 2) if jaccard(sets[i], sets[j]) >= 0.8}
    assert len(similar) > 100
    found = {pair[:2] for pair in minhash.pairs(minhash.signatures(texts), tmp_path, 0.72)}
    assert len(similar & found) / len(similar) > 0.97
    assert all(jaccard(sets[i], sets[j]) > 0.6 for i, j in found)


def test_a_large_bucket_is_connected_without_all_pairs(tmp_path: Path) -> None:
    count = 4 * ALL_PAIRS
    pairs = list(MinHash().pairs(MinHash().signatures(["the same text"] * count), tmp_path, 0.8))
    assert {pair.second for pair in pairs} == set(range(1, count))
    assert len(pairs) <= 2 * count * MinHash().bands


def test_keys_are_equal_where_all_rows_of_a_band_are(tmp_path: Path) -> None:
    minhash = MinHash(bands=3, rows=2)
    keys = minhash.keys(np.array([1, 2, 3, 4, 5, 6], np.uint32))
    assert list(minhash.keys(np.array([1, 2, 4, 3, 5, 6], np.uint32)) == keys) == [True, False, True]
    with Buckets(tmp_path, 3) as buckets:
        buckets.add(keys)


# ---- in a run


def trace(text: str, question: str = "20 + 22?", sample: int = 0, gold: str | None = "42") -> Trace:
    reasoning, response = split_reasoning(f"<think>a</think>{text}")
    whole = f"<think>a</think>{text}"
    return Trace(Prompt.from_question(question, gold), sample, 0, whole, reasoning, response, "stop", "t")


def recipe(**filters: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "teacher": "tiny-r1",
            "student": "tiny-qwen",
            "prompts": [{"kind": "procedural", "name": "arithmetic"}],
            "filter": filters,
            "eval": {"benchmarks": ["tiny-arithmetic"]},
        }
    )


def verdicts(directory: Path, traces: Iterable[Trace], name: str, **filters: object) -> dict[tuple[str, int], Verdict]:
    """Run the stage; the verdicts of one filter by question and sample."""
    with Run(directory, recipe(**filters)) as run:
        run.paths.traces.mkdir()
        with TraceStore(run.paths.traces) as store:
            store.append(traces)
        STAGE.perform(run)
        read = [*read_traces(run.paths.kept), *read_traces(run.paths.dropped)]
    return {
        (each.prompt.messages[0]["content"], each.sample): verdict
        for each, given in read
        for verdict in given
        if verdict.filter == name
    }


def test_near_duplicates_across_prompts(tmp_path: Path) -> None:
    draw = random.Random(2)
    words = draw.choices(WORDS, k=200)
    chain = [words]
    for _ in range(3):
        chain.append(changed(draw, chain[-1], 3))
    texts = [" ".join(each) for each in chain]
    questions = [f"question {n}?" for n in range(4)]
    traces = [trace(text, question) for text, question in zip(texts, questions, strict=True)]
    traces.append(trace(" ".join(draw.choices(WORDS, k=200)), "another?"))
    found = verdicts(tmp_path / "run", traces, "near_answers", correct=False, near_answers=True)
    dropped = {question: verdict for (question, _), verdict in found.items() if not verdict.keep}
    first = min(traces[:4], key=lambda each: each.key)
    assert set(dropped) == set(questions) - {first.prompt.messages[0]["content"]}, "the first by prompt id stays"
    assert {verdict.evidence["of_prompt"] for verdict in dropped.values()} == {first.prompt.id}
    assert all(0.7 < float(str(verdict.evidence["similarity"])) < 1 for verdict in dropped.values())


def test_near_prompts_differ_by_their_numbers(tmp_path: Path) -> None:
    asked = "Ann has {} pears and Bob has {} plums; they eat some of them on the way. How many fruits have they left?"
    questions = [asked.format(7, 5), asked.format(7, 5) + " Think.", asked.format(7, 6), asked.format(5, 7)]
    questions += [f"小明有 {number} 个苹果,他吃了几个,又买了几个,现在他一共有多少个苹果?" for number in (3, 4)]
    traces = [trace(r"\boxed{42}", question, sample) for question in questions for sample in range(2)]
    found = verdicts(tmp_path / "run", traces, "near_prompts", correct=False, near_prompts=True, dedup=False)
    dropped = [question for (question, _), verdict in found.items() if not verdict.keep]
    assert len(dropped) == 2 and len(set(dropped)) == 1 and set(dropped) < set(questions[:2])


STORY = "In a small town by the river, Ann keeps a shop where people buy pears and plums on their way to the market."


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"{STORY} What is 20 + 22?", f"{STORY} What is 20 × 22?"),
        (f"{STORY} Solve x^2 < 90 for x.", f"{STORY} Solve x^2 > 90 for x."),
        (f"{STORY} Find the maximum.", f"{STORY} Find the minimum."),
        (f"{STORY} She buys three.", f"{STORY} She buys four."),
        (f"{STORY} Is it true?", f"{STORY} Is it not true?"),
    ],
)
def test_prompts_that_one_word_makes_another_problem(one: str, other: str, tmp_path: Path) -> None:
    traces = [trace(r"\boxed{42}", question) for question in (one, other, f"{one} Please.")]
    found = verdicts(tmp_path / "run", traces, "near_prompts", correct=False, near_prompts={"threshold": 0.5})
    dropped = {question for (question, _), verdict in found.items() if not verdict.keep}
    assert len(dropped) == 1 and dropped < {one, f"{one} Please."}


DIFFERENT = [
    ("Calculate 37 + 48 - 66 + 12 - 5.", "Calculate 37 - 48 + 66 - 12 + 5."),
    ("Is 3 < 5 or 3 > 5?", "Is 3 > 5 or 3 < 5?"),
    ("Solve x^2 = -4 for x.", "Solve x^2 = 4 for x."),
    (r"Compute $3 \div 4$.", r"Compute $3 \times 4$."),
    (r"Compute $\sin 3$.", r"Compute $\cos 3$."),
    (r"Find $A \cap B$.", r"Find $A \cup B$."),
    ("Find A \u222a B.", "Find A \u2229 B."),
    ("Is p → q?", "Is p ↔ q?"),
    ("Is ~p & q?", "Is p & q?"),
    ("Compute (a+b)*c.", "Compute a+(b*c)."),
    ("Is 2 in [2, 3]?", "Is 2 in (2, 3)?"),
    ("- 5x is 3", "5x is 3"),
    ("It costs €5.", "It costs £5."),
]
EQUAL = [
    ("What is 2 + 3?", "what is 2+3 ?"),
    ("What is 2 + 3?", "**Question:** What is 2 + 3? Put it in <answer> tags."),
    ("What is 2 + 3?", r"- What is 2 + 3? Put it within \boxed{}."),
    ("Well - what is 2 + 3?", "Well, what is 2 + 3?"),
    (r"Is $x \leq 3$?", r"Is $x \le 3$?"),
    ("Find 2 − 3.", "Find 2 - 3."),
]


@pytest.mark.parametrize(("one", "other", "equal"), [(*p, False) for p in DIFFERENT] + [(*p, True) for p in EQUAL])
def test_symbols_make_another_problem_and_marks_do_not(one: str, other: str, equal: bool) -> None:
    salts = {NearPrompts().salt_of(trace("a", question)) for question in (one, other)}
    assert (len(salts) == 1) is equal


def test_texts_without_words_are_compared_by_their_characters() -> None:
    def kept(filter_: ChoosingFilter, *traces: Trace) -> list[bool]:
        chosen = choose(filter_, list(traces))
        return [chosen[each.key].keep for each in traces]

    assert kept(NearPrompts(), trace("a", "?"), trace("a", "!")) == [True, True]
    assert kept(NearPrompts(), trace("a", "😀"), trace("a", "😁")) == [True, True]
    empty = [Trace(Prompt.from_question(question, None), 0, 0, "", None, "", "stop", "t") for question in "ab"]
    assert kept(NearAnswers(), *empty) == [True, True], "of two prompts"
    words = "un café déjà fermé à côté de la forêt, où l'élève a mangé une pêche mûre et un gâteau âcre très tôt hier"
    decomposed = unicodedata.normalize("NFD", words)
    assert kept(Dedup(), trace(words), trace(decomposed, sample=1)) == [True, False]
    assert kept(NearAnswers(), trace(words), trace(decomposed, sample=1)) == [True, False]


def test_shares_of_a_majority_are_exact() -> None:
    """0.56 * 25 is 14.000000000000002 in floating point."""
    texts = [r"\boxed{1}"] * 14 + [rf"\boxed{{{number}}}" for number in range(2, 13)]
    traces = [trace(text, sample=sample, gold=None) for sample, text in enumerate(texts)]
    chosen = choose(Majority(min_share=0.56, workers=1), traces)
    assert [verdict.keep for verdict in chosen.values()] == [True] * 14 + [False] * 11


def test_majority(tmp_path: Path) -> None:
    answers = [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{2/4}", r"\boxed{2}", "It is 2, I think."]
    traces = [trace(answer, "open?", sample, None) for sample, answer in enumerate(answers)]
    traces.append(trace(r"\boxed{1}", "closed?"))
    settings = {"correct": False, "majority": {"workers": 1}}
    found = verdicts(tmp_path / "run", traces, "majority", **settings)
    assert [found["open?", sample].reason for sample in range(5)] == ["ok", "ok", "ok", "minority", "no_answer"]
    assert found["open?", 1].evidence == {"answer": "0.5", "votes": 3, "of": 4}
    assert found["closed?", 0].keep


def test_pass_rates_are_over_all_samples(tmp_path: Path) -> None:
    """Also over those that `format` drops; with 3 of 4 right the rate is 0.75."""
    answers = [r"\boxed{42}", r"\boxed{42} ", r"\boxed{42} so", r"\boxed{41}"]
    traces = [trace(answer, "hard?", sample) for sample, answer in enumerate(answers)]
    traces += [trace(f"\\boxed{{42}} {sample}", "easy?", sample) for sample in range(4)]
    settings = {"correct": {"workers": 1}, "dedup": False, "pass_rate": {"max_rate": 0.9}}
    found = verdicts(tmp_path / "run", traces, "pass_rate", **settings)
    assert found["hard?", 0].evidence == {"passed": 3, "samples": 4, "rate": 0.75}
    assert {key[0]: verdict.reason for key, verdict in found.items()} == {"hard?": "ok", "easy?": "too_easy"}
    for wrong in ({}, {"min_rate": 0.9, "max_rate": 0.1}):
        with pytest.raises(ValidationError):
            recipe(pass_rate=wrong)
    with pytest.raises(ValidationError, match="pass_rate needs the verdicts of correct"):
        recipe(pass_rate={"min_rate": 0.1}, correct=False)


def test_lengths_in_tokens_of_the_student(tmp_path: Path) -> None:
    resources = RunResources(recipe())
    text = "<think>a</think>The sum is 42."
    count = resources.student_tokens(text)
    assert count > len(text.split()) and RunResources(recipe()).student_tokens("") == 0
    length = {"unit": "student", "max_tokens": count}
    traces = [trace("The sum is 42."), trace("The sum is 42. Yes.", sample=1)]
    found = verdicts(tmp_path / "run", traces, "length", correct=False, length=length)
    assert [(v.reason, v.evidence["unit"]) for v in found.values()] == [
        ("ok", "student tokens"),
        ("too_long", "student tokens"),
    ]
    assert found["20 + 22?", 0].evidence["length"] == count
    assert recipe(length=length).filter_settings()["student"] == "tiny-qwen"
    assert "student" not in recipe(length={"max_tokens": 9}).filter_settings()
    with pytest.raises(LookupError):
        Resources().student_tokens("")
    missing = recipe(length=length).model_copy(update={"student": "nobody"})
    with Run(tmp_path / "other", missing) as run, pytest.raises(UserError, match="nobody"):
        run.paths.traces.mkdir()
        with TraceStore(run.paths.traces) as store:
            store.append(traces)
        STAGE.perform(run)
    assert not (tmp_path / "other" / "filtered").exists()


def test_orders_of_selection(tmp_path: Path) -> None:
    texts = ["one two three four five", "one two three four six", "a b c d e f g", "one two three four five seven"]
    traces = [trace(text, sample=sample) for sample, text in enumerate(texts)]

    def kept(directory: str, **select: object) -> list[int]:
        found = verdicts(tmp_path / directory, traces, "select", correct=False, select={"per_prompt": 2} | select)
        return sorted(sample for (_, sample), verdict in found.items() if verdict.keep)

    assert kept("diverse", order="diverse") == [0, 2]
    assert kept("closest", order="closest", tokens=7) == [2, 3]
    lengths = [RunResources(recipe()).student_tokens(each.text) for each in traces]
    nearest = sorted(range(4), key=lambda sample: (abs(lengths[sample] - max(lengths)), sample))[:2]
    assert kept("student", order="closest", tokens=max(lengths), unit="student") == sorted(nearest)
    for wrong in ({"order": "closest"}, {"order": "first", "tokens": 3}):
        with pytest.raises(ValidationError, match="need one another"):
            recipe(select={"per_prompt": 1} | wrong)


# ---- profiles


def test_a_profile_is_a_set_of_defaults() -> None:
    assert set().union(*PROFILES.values()) <= set(FILTERS)
    math = Filter.model_validate({"profile": "math", "language": False, "length": {"min_tokens": 3}})
    assert math.repetition and math.correct and math.language is None and math.length
    assert Filter.model_validate({"profile": "chat"}).correct is None
    assert Filter.model_validate({"profile": "chat", "correct": True}).correct
    same = Filter.model_validate({"repetition": True, "language": True})
    assert Filter.model_validate({"profile": "code"}).settings() == same.settings(), "it is no setting of its own"
    written = Filter.model_validate_json('{"profile": "math"}').model_dump(mode="json")
    assert Filter.model_validate(written) == Filter.model_validate({"profile": "math"})
    with pytest.raises(ValidationError):
        Filter.model_validate({"profile": "poetry"})


def test_runs_from_before_a_filter_existed_go_on() -> None:
    """What is off by default and new leaves no trace in the settings of a run; the quickstart's are as they were."""
    before = {"format", "finish", "correct", "length", "dedup", "select"}
    new = [name for name, info in Filter.model_fields.items() if Later in info.metadata]
    assert {*new, *before} == set(FILTERS)
    assert load_recipe("tiny").filter_settings() == {
        "format": True,
        "finish": True,
        "correct": True,
        "correct.timeout": 5.0,
        "length": True,
        "length.min_tokens": 30,
        "length.max_tokens": None,
        "dedup": True,
        "select": False,
    }
