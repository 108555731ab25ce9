"""Subsamples and mixtures: proportions, and that asking for more never replaces what was asked for before."""

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_support import jsonl, read

from distill.catalog import check_recipe
from distill.prompts import Prompt, PromptCounts, load_prompts
from distill.prompts.selection import interleaved
from distill.recipe import Recipe
from distill.recipe.sources import FilePrompts, ProceduralPrompts


def numbered(path: Path, count: int, name: str = "q") -> Path:
    return jsonl(path, *({"question": f"{name} {n}", "answer": str(n)} for n in range(count)))


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in prompts]


# Subsamples


def test_a_subsample_is_a_prefix_of_a_larger_one(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 200)
    whole = texts(read(path, shuffle_seed=1))
    assert sorted(whole) == sorted(texts(read(path))) and whole != texts(read(path))
    for limit in (1, 10, 50, 199):
        assert texts(read(path, shuffle_seed=1, limit=limit)) == whole[:limit]
    other = texts(read(path, shuffle_seed=2, limit=50))
    assert len(set(other) & set(whole[:50])) < 30, "another seed is another sample"


def test_a_subsample_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = [{"question": f"q {n}", "answer": str(n)} for n in range(100)]
    there, back = jsonl(tmp_path / "a.jsonl", *rows), jsonl(tmp_path / "b.jsonl", *rows[::-1])
    assert texts(read(there, shuffle_seed=3, limit=20)) == texts(read(back, shuffle_seed=3, limit=20))
    grown = jsonl(tmp_path / "c.jsonl", {"question": "new", "answer": "1"}, *rows)
    assert (
        len(set(texts(read(grown, shuffle_seed=3, limit=20))) & set(texts(read(there, shuffle_seed=3, limit=20)))) >= 19
    )


def test_a_subsample_is_spread_evenly(tmp_path: Path) -> None:
    """Each row is in a tenth of the samples of a tenth."""
    path = numbered(tmp_path / "a.jsonl", 50)
    counts = Counter(text for seed in range(200) for text in texts(read(path, shuffle_seed=seed, limit=5)))
    assert len(counts) == 50 and 5 <= min(counts.values()) <= max(counts.values()) <= 40  # 20 ± 4.5 standard deviations


def test_a_broken_row_outside_the_subsample_is_refused_too(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"question": "" if n == 99 else f"q {n}", "answer": "1"} for n in range(100)))
    with pytest.raises(ValueError, match="line 100: column question is empty"):
        read(path, shuffle_seed=1, limit=1)


# Mixtures


def endless(name: str) -> Any:
    return (Prompt.from_question(f"{name} {n}", "1") for n in range(1 << 30))


@given(
    weights=st.lists(st.integers(1, 1000) | st.floats(0.01, 100), min_size=1, max_size=6), length=st.integers(1, 300)
)
def test_every_prefix_of_a_mixture_has_its_proportions(weights: list[float], length: int) -> None:
    mixture = interleaved([endless(str(i)) for i in range(len(weights))], weights, lambda prompt: True)
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    taken = Counter[int]()
    for n in range(1, length + 1):
        taken[int(next(mixture).messages[0]["content"].split()[0])] += 1
        assert all(abs(taken[i] - n * share) < 1 for i, share in enumerate(shares))


def sources(tmp_path: Path, **limits: Any) -> list[FilePrompts]:
    paths = [numbered(tmp_path / f"{name}.jsonl", 100, name) for name in ("a", "b")]
    return [
        FilePrompts(kind="file", path=str(paths[0]), weight=3, **limits),
        FilePrompts(kind="file", path=str(paths[1]), shuffle_seed=5),  # weight 1
    ]


def test_a_mixture_is_exact_and_ends_with_the_first_source(tmp_path: Path) -> None:
    counts = PromptCounts()
    mixed = texts(list(load_prompts(sources(tmp_path), counts)))
    assert Counter(text[0] for text in mixed) == {"a": 100, "b": 33}
    assert Counter(text[0] for text in mixed[:40]) == {"a": 30, "b": 10}
    assert counts.notes() == [
        "the mixture ends after 133 prompts: prompts.0 (weight 3) has no more; raise its limit, or lower its weight"
    ]


def test_a_longer_mixture_extends_a_shorter_one(tmp_path: Path) -> None:
    whole = texts(list(load_prompts(sources(tmp_path))))
    for limit in (1, 2, 40, 133, 500):
        counts = PromptCounts()
        assert texts(list(load_prompts(sources(tmp_path), counts, limit))) == whole[:limit]
        assert bool(counts.notes()) == (limit == 500), "a mixture that reached its limit did not end early"
    for limit in (3, 30):
        shorter = texts(list(load_prompts(sources(tmp_path, limit=limit))))
        assert shorter == whole[: len(shorter)] and sum(text[0] == "a" for text in shorter) == limit


def test_a_prompt_of_two_sources_does_not_count_for_the_second(tmp_path: Path) -> None:
    first = FilePrompts(kind="file", path=str(numbered(tmp_path / "a.jsonl", 10)), weight=1)
    second = FilePrompts(kind="file", path=str(numbered(tmp_path / "b.jsonl", 20)), weight=1)
    counts = PromptCounts()
    mixed = list(load_prompts([first, second], counts))
    assert len(mixed) == len(set(texts(mixed)))
    assert counts.notes()[0].endswith("prompts repeat an earlier one and are read once")


def test_without_weights_sources_are_read_in_order_up_to_the_limit(tmp_path: Path) -> None:
    plain = [source.model_copy(update={"weight": None, "shuffle_seed": None}) for source in sources(tmp_path)]
    assert [text[0] for text in texts(list(load_prompts(plain, None, 150)))] == ["a"] * 100 + ["b"] * 50


def test_rows_without_gold_are_counted_even_where_a_mixture_ends_first(tmp_path: Path) -> None:
    bare = jsonl(tmp_path / "a.jsonl", *({"question": f"q {n}", "answer": None} for n in range(50)))
    chains = ProceduralPrompts(kind="procedural", name="arithmetic", limit=5, weight=1)
    counts = PromptCounts()
    list(load_prompts([FilePrompts(kind="file", path=str(bare), weight=1), chains], counts))
    assert counts.notes()[0].startswith(f"{tmp_path.name}/a.jsonl: 6 of 6 problems have no gold answer")


def test_check_reads_every_row_of_a_mixture(tmp_path: Path) -> None:
    broken = jsonl(tmp_path / "a.jsonl", *({"question": "" if n == 80 else f"q {n}", "answer": "1"} for n in range(90)))
    small = numbered(tmp_path / "b.jsonl", 3, "b")
    recipe = Recipe.model_validate(
        {
            "name": "mixed",
            "teacher": "tiny-r1",
            "student": "tiny-qwen",
            "prompts": [{"kind": "file", "path": str(path), "weight": 1} for path in (small, broken)],
            "eval": {"benchmarks": ["tiny-arithmetic"]},
        }
    )
    assert len(list(load_prompts(recipe.prompts))) == 6, "the mixture itself ends before it"
    with pytest.raises(ValueError, match="line 81: column question is empty"):
        check_recipe(recipe, prompts=True)


# Duplicates


def test_questions_that_differ_in_spelling_or_gold_are_reported_and_kept(tmp_path: Path) -> None:
    rows = [
        ("What is 2 + 3?", "5"),
        ("what is  2 + 3?\n", "5"),
        ("What is 2 + 3?", "6"),
        ("What is 2 + 3?", "5"),
        ("Other", "1"),
    ]
    path = jsonl(tmp_path / "a.jsonl", *({"question": q, "answer": a} for q, a in rows))
    counts = PromptCounts()
    prompts = list(load_prompts([FilePrompts(kind="file", path=str(path))], counts))
    assert len(prompts) == 4
    assert counts.notes() == [
        "1 of 5 prompts repeat an earlier one and are read once",
        "1 of 4 prompts ask the question of an earlier one with another gold answer, such as 'What is 2 + 3?'; all are "
        "kept",
        "1 of 4 prompts differ from an earlier one in case or white space only, such as 'what is 2 + 3?'; all are kept",
    ]


def test_roles_are_part_of_a_question(tmp_path: Path) -> None:
    turns = [[{"role": role, "content": "a"}, {"role": "user", "content": "b"}] for role in ("system", "user")]
    path = jsonl(tmp_path / "a.jsonl", *({"question": t, "answer": "1"} for t in turns))
    counts = PromptCounts()
    assert len(list(load_prompts([FilePrompts(kind="file", path=str(path))], counts))) == 2
    assert counts.notes() == []


def test_a_shuffled_source_from_which_nothing_is_extracted_is_refused_at_once(tmp_path: Path) -> None:
    source = FilePrompts(
        kind="file", path=str(numbered(tmp_path / "a.jsonl", 9)), extract="boxed", shuffle_seed=1, limit=2
    )
    with pytest.raises(ValueError, match="no row has"):
        next(load_prompts([source]))
