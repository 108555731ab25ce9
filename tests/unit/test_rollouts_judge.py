"""Rewards by a judge behind a server: a scripted one, which accepts a response by its text."""

import json
from pathlib import Path
from typing import Any

import pytest
import rollout_support as support
from eval_support import server, url

from distill.errors import UserError, WorkError
from distill.prompts import load_prompts
from distill.recipe import Recipe
from distill.run import Run
from distill.traces.ledger import Ledger
from distill.train import STAGE

PARTLY = {"kind": "grpo", "rewards": {"correct": 1.0, "length": 0.5}}


def response_of(question: str) -> str:
    return question.split("Response:\n")[1].split("\n\nIs the response right?")[0]


def opinion(response: str) -> str:
    """Yes, No or nothing, as deterministic as it is arbitrary: groups get variance."""
    return ("Judgement: Yes", "Judgement: No", "Hm.")[sum(map(ord, response)) % 3]


def verdict(question: str, seed: int | None) -> Any:
    return opinion(response_of(question)), "stop"


def make_recipe(directory: Path, address: str, judge: dict[str, Any] | None = None, **train: Any) -> Recipe:
    """Every second prompt is of task judge."""
    recipe = support.make_recipe(PARTLY, **{"max_steps": 2, "save_steps": 1} | train)
    prompts = list(load_prompts(recipe.prompts))
    sources = []
    for task, chosen in (("judge", prompts[::2]), ("math", prompts[1::2])):
        path = directory / f"{task}.jsonl"
        rows = ({"question": each.messages[-1]["content"], "answer": each.answer} for each in chosen)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"kind": "file", "path": str(path), "task": task})
    settings = {"server": {"url": address, "model": "scripted", "concurrency": 4}} | (judge or {})
    return Recipe.model_validate(recipe.model_dump(mode="json") | {"prompts": sources, "judge": settings})


def asked_once(directory: Path) -> set[str]:
    """The ids of the stored judgements; fails if one is stored twice."""
    ids = [row["id"] for row in Ledger(directory / "judgements" / "train.jsonl").rows()]
    assert len(ids) == len(set(ids))
    return set(ids)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("judged")
    with server(verdict) as made:
        summary = support.train(directory / "run", make_recipe(directory, url(made)))
        return directory / "run", summary, len(made.asked)


def test_the_judge_s_verdicts_are_rewards(trained):
    directory, summary, asked = trained
    assert summary.steps == 2 and asked == len(asked_once(directory))
    rewards = support.rewards(directory)
    verdicts = {"Judgement: Yes": True, "Judgement: No": False, "Hm.": None}
    seen = set()
    for trace in support.rollouts(directory):
        if trace.prompt.task == "judge" and trace.finish_reason != "length" and trace.answer.strip():
            assert rewards[trace.key].correct is verdicts[opinion(trace.answer.strip())], trace.answer
            seen.add(rewards[trace.key].correct)
        elif trace.prompt.task == "judge" and trace.finish_reason == "length":
            assert rewards[trace.key].correct is False, "it was cut off, and could have gone on"
    assert seen == {True, False, None}
    assert all(0 < row["unverifiable"] < 1 for row in support.log(directory))


def test_a_judge_that_fails_ends_the_training_and_a_rerun_asks_for_what_is_missing(trained, tmp_path):
    whole, _, total = trained
    left = [total // 2]

    def failing(question: str, seed: int | None) -> Any:
        left[0] -= 1
        return verdict(question, seed) if left[0] >= 0 else 404

    with server(failing) as made, pytest.raises((UserError, WorkError), match="404"):
        support.train(tmp_path / "run", make_recipe(tmp_path, url(made)))
    stored = asked_once(tmp_path / "run")
    assert 0 < len(stored) < total
    with server(verdict) as made:
        support.train(tmp_path / "run", make_recipe(tmp_path, url(made)))
        assert len(made.asked) == total - len(stored)
    assert support.rewards(tmp_path / "run") == support.rewards(whole)
    assert support.log(tmp_path / "run") == support.log(whole) and support.weights(tmp_path / "run") == support.weights(
        whole
    )


def test_another_judge_is_another_training(trained, tmp_path):
    changed = make_recipe(tmp_path, "http://127.0.0.1:9/v1", {"min_score": 3.0})
    with Run(trained[0], changed) as run, pytest.raises(UserError, match=r"judge_model\.min_score: null → 3\.0"):
        STAGE.perform(run)


def test_a_judge_that_cannot_be_reached_leaves_nothing(tmp_path):
    with server(verdict) as made:
        gone = url(made)
    with pytest.raises(UserError) as caught:
        support.train(tmp_path / "run", make_recipe(tmp_path, gone))
    assert "\n" not in str(caught.value) and gone.split("/")[2] in str(caught.value)
    assert not (tmp_path / "run" / "stages" / "train.json").exists(), "another address may be given"


def test_a_budget_of_money_without_a_price_is_refused_before_the_first_step(tmp_path):
    recipe = make_recipe(tmp_path, "http://127.0.0.1:9/v1", {"budget": {"cost": 1.0}})
    with pytest.raises(UserError, match=r"judge\.budget\.cost needs a price"):
        support.train(tmp_path / "run", recipe)
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.slow
def test_one_of_two_ranks_asks_for_both(trained, tmp_path):
    whole, _, total = trained
    with server(verdict) as made:
        recipe = make_recipe(tmp_path, url(made), num_processes=2)
        assert support.train(tmp_path / "run", recipe).processes == 2
        assert len(made.asked) == total == len(asked_once(tmp_path / "run"))
    assert support.rewards(tmp_path / "run") == support.rewards(whole)
