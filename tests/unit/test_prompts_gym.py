"""reasoning-gym: its problems as prompts, and its own scores as verdicts."""

import json
from pathlib import Path
from typing import Any

import pytest
from prompt_support import refused
from pydantic import ValidationError

from distill.catalog import check_recipe
from distill.errors import UserError
from distill.grading import Grade, Grader, require_grader, unreadable_golds
from distill.grading.gym import GymGrader
from distill.prompts import Prompt, gym, load_prompts
from distill.prompts.gym import REFUSED, read_gold
from distill.recipe import Recipe
from distill.recipe.sources import GymPrompts


def problems(name: str, limit: int = 3, **fields: Any) -> list[Prompt]:
    return list(load_prompts([GymPrompts(kind="reasoning_gym", name=name, limit=limit, **fields)]))


def answer_of(prompt: Prompt) -> str:
    gold = read_gold(prompt.answer or "")
    assert gold is not None and gold["answer"] is not None
    return gold["answer"]


@pytest.mark.slow
def test_problems_are_those_of_the_library() -> None:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("chain_sum", seed=7, size=4, min_terms=2, max_terms=3)
    prompts = problems("chain_sum", 4, seed=7, config={"min_terms": 2, "max_terms": 3})
    assert [p.messages[0]["content"] for p in prompts] == [dataset[i]["question"] for i in range(4)]
    assert [answer_of(p) for p in prompts] == [dataset[i]["answer"] for i in range(4)]
    assert {(p.task, p.source) for p in prompts} == {("gym", "reasoning_gym/chain_sum")}
    more = problems("chain_sum", 9, seed=7, config={"min_terms": 2, "max_terms": 3})
    assert more[:4] == prompts, "a raised limit extends the problems"


@pytest.mark.slow
def test_problems_do_not_depend_on_the_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        made.append(problems("word_ladder", 2) + problems("polynomial_multiplication", 2))
    assert made[0] == made[1]


@pytest.fixture(scope="module")
def grades() -> dict[str, Grade]:
    """Grades of answers to one problem of several datasets, by the kind of answer."""
    sums, game, words, grid = (
        problems(name, 1, seed=3)[0] for name in ("chain_sum", "countdown", "word_ladder", "sudoku")
    )
    gold = {prompt.id: answer_of(prompt) for prompt in (sums, game, words, grid)}
    count = gold[sums.id]
    items = {
        "tagged": (sums, f"<think>Hm.</think>So <answer>{count}</answer>"),
        "boxed": (sums, f"<think>Hm.</think>So \\boxed{{{count}}}."),
        "box in tag": (sums, f"<think>Hm.</think><answer>\\boxed{{\\text{{{count}}}}}</answer>"),
        "stated": (sums, f"<think>Hm.</think>The answer is {count}."),
        "bare": (sums, f"<think>Hm.</think>{count}"),
        "wrong": (sums, f"<think>{count}</think><answer>1{count}</answer>"),
        "prose": (sums, f"<think>Hm.</think><answer>It is {count} in all</answer>"),
        "latex": (sums, f"<think>Hm.</think>\\boxed{{\\frac{{{count}}}{{1}}}}"),
        "unmarked": (sums, "<think>Hm.</think>I cannot say what this would be in the end."),
        "empty": (sums, "<think>Hm.</think><answer> </answer>"),
        "same way": (game, f"<think>Hm.</think><answer>{gold[game.id]}</answer>"),
        "words": (words, f"<think>Hm.</think><answer>{gold[words.id]}</answer>"),
        "grid": (grid, f"<think>Hm.</think>\n{gold[grid.id]}\n"),
        "command": (game, "<think>Hm.</think><answer>__import__('os').system('true')</answer>"),
        "file": (game, "<think>Hm.</think><answer>open('/tmp/never-written', 'w')</answer>"),
        "after": (sums, f"<think>Hm.</think><answer>{count}</answer>"),
    }
    with Grader(workers=1) as grader:
        return dict(grader.grade((name, prompt, text) for name, (prompt, text) in items.items()))


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    ("name", "verdict", "reason"),
    [
        ("tagged", "correct", "full score"),
        ("boxed", "correct", "full score"),
        ("box in tag", "correct", "full score"),
        ("stated", "correct", "full score"),
        ("bare", "correct", "full score"),
        ("wrong", "wrong", "below full score"),
        ("prose", "unverifiable", "more text around the answer"),
        ("latex", "unverifiable", "answer in LaTeX"),
        ("unmarked", "unverifiable", "no marked answer"),
        ("empty", "unverifiable", "no answer found"),
        ("same way", "correct", "full score"),
        ("words", "correct", "full score"),
        ("grid", "correct", "full score"),
        ("command", "unverifiable", "worker died"),
        ("file", "unverifiable", "worker died"),
        ("after", "correct", "full score"),
    ],
)
def test_verdicts(grades: dict[str, Grade], name: str, verdict: str, reason: str) -> None:
    assert (grades[name].verdict, grades[name].reason) == (verdict, reason)


def test_an_answer_cannot_write_a_file(grades: dict[str, Grade]) -> None:
    assert grades and not Path("/tmp/never-written").exists()


@pytest.mark.slow
def test_a_problem_that_another_version_made_is_unverifiable() -> None:
    (prompt,) = problems("chain_sum", 1)
    gold = json.loads(prompt.answer or "")
    for change in ({"question": "0" * 16}, {"answer": "another"}):
        old = Prompt(prompt.messages, "gym", json.dumps(gold | change))
        with Grader(workers=1) as grader:
            ((_, grade),) = grader.grade([(0, old, f"<answer>{gold['answer']}</answer>")])
        assert (grade.verdict, grade.reason) == ("unverifiable", "another version of reasoning-gym made the problem")


def test_golds_that_name_no_problem_are_no_golds() -> None:
    grader = GymGrader()
    for text in ("12", "{}", "[1]", '{"dataset": "chain_sum"}'):
        assert grader.gold(text) == "" and not grader.reads_plainly(text)
    assert unreadable_golds(problems("chain_sum", 2), 1, 5.0) == ([], 2)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("no_such", {}, "no such dataset; reasoning-gym"),
        ("chain_sum", {"config": {"terms": 3}}, "`config` is refused ("),
        ("chain_sum", {"config": {"min_terms": 9, "max_terms": 2}}, "max_terms must be >= min_terms"),
        ("composite", {}, "name each of its datasets as a source with a `weight`"),
        ("acre", {}, "its problems change with their number"),
    ],
)
def test_what_cannot_be_made_is_refused(name: str, fields: dict[str, Any], said: str) -> None:
    refused([GymPrompts(kind="reasoning_gym", name=name, limit=2, **fields)], f"reasoning_gym {name}: ", said)


def test_keys_of_the_source_are_not_keys_of_config() -> None:
    for key, ours in (("seed", "seed"), ("size", "limit")):
        with pytest.raises(ValidationError, match=f"config.{key} is set by `{ours}`"):
            GymPrompts(kind="reasoning_gym", name="chain_sum", config={key: 1})


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym, "find_spec", lambda name: None)
    refused([GymPrompts(kind="reasoning_gym", name="chain_sum")], "not installed", "`pip install distill[gym]`")
    with pytest.raises(UserError, match=r"filter.correct: .*pip install distill\[gym\]"):
        require_grader("gym", "filter.correct")


@pytest.mark.slow
def test_every_dataset_accepts_its_own_answers_and_extends() -> None:
    """Grading makes problems 0 and 1 anew in a shorter list, so `limit` does not change them."""
    from reasoning_gym.factory import DATASETS

    names = sorted(DATASETS.keys() - REFUSED.keys())
    prompts, items = dict[str, list[Prompt]](), list[tuple[str, Prompt, str]]()
    for name in names:
        prompts[name] = problems(name, 4, seed=11)
        for prompt in prompts[name]:
            gold = read_gold(prompt.answer or "")
            assert gold is not None
            if gold["answer"] is not None:
                items.append((name, prompt, f"<answer>{gold['answer']}</answer>"))
    with Grader(workers=1, timeout=20.0) as grader:
        refused_own = {name: grade for name, grade in grader.grade(items) if grade.verdict != "correct"}
    assert not refused_own


def test_check_names_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "gym",
            "teacher": "tiny-r1",
            "student": "tiny-qwen",
            "prompts": [{"kind": "reasoning_gym", "name": "chain_sums"}],
            "eval": {"benchmarks": ["tiny-arithmetic"]},
        }
    )
    with pytest.raises(UserError, match="reasoning_gym chain_sums: no such dataset"):
        check_recipe(recipe, prompts=True)
