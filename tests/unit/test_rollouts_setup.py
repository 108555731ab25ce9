"""Several teachers, and the checks of a recipe that learns from rollouts before any is sampled."""

from pathlib import Path

import pytest

from distill.catalog import load_recipe
from distill.errors import UserError
from distill.models import Models
from distill.prompts import load_prompts
from distill.train.rollouts import setup
from distill.train.rollouts.questions import questions_of
from distill.train.rows.encode import is_held_out

TEACHERS = Path(__file__).resolve().parents[2] / "teachers"


def recipe(tmp_path, objective, *more):
    import json

    return load_recipe("tiny", [f"train.objective={json.dumps(objective)}", "prompts.0.limit=4", *more])


def test_prompts_are_routed_to_the_teacher_of_their_task(tmp_path):
    from dataclasses import replace

    from distill.train.rollouts.feed import Judges

    asked = recipe(
        tmp_path, {"kind": "on_policy", "teachers": {"math": str(TEACHERS / "tiny-r1")}}, "train.max_length=1024"
    )
    models = Models(asked, tmp_path)
    assert models.teachers["math"].identity == models.teacher.identity
    questions = questions_of(asked, models.base.chat)
    setup.check(asked, models, questions)
    prompts = questions.prompts
    general, special = object(), object()
    judges = Judges({"": general, "math": special})  # type: ignore[dict-item]  # only told apart here
    assert {judges.teacher(prompt) for prompt in prompts} == {special}
    assert judges.teacher(replace(prompts[0], task="chat")) is general


def test_prompts_whose_traces_are_held_out_are_not_answered(tmp_path):
    """The rows of their traces are evaluated; the student must not have been trained on these prompts."""
    asked = recipe(
        tmp_path,
        {"kind": "on_policy", "student_share": 0.5},
        "train.val_size=0.5",
        "train.seed=3",
        "prompts.0.limit=40",
    )
    chat = Models(asked, tmp_path).base.chat
    every = {prompt.id for prompt in load_prompts(asked.prompts)}
    held_out = {id_ for id_ in every if is_held_out(id_, 0.5, 3)}
    assert 5 < len(held_out) < 35
    assert {prompt.id for prompt in questions_of(asked, chat).prompts} == every - held_out
    whole = questions_of(recipe(tmp_path, {"kind": "on_policy"}, "prompts.0.limit=40"), chat)
    assert {prompt.id for prompt in whole.prompts} == every


def test_a_teacher_for_a_task_that_no_prompt_has_is_refused(tmp_path):
    asked = recipe(tmp_path, {"kind": "on_policy", "teachers": {"code": "tiny-r1"}}, "train.max_length=1024")
    with pytest.raises(UserError, match=r"^train\.objective\.teachers: no prompt has task code; .*$"):
        models = Models(asked, tmp_path)
        setup.check(asked, models, questions_of(asked, models.base.chat))


def test_traces_of_several_teachers_are_refused(tmp_path):
    with pytest.raises(UserError, match="all scored by the recipe's teacher"):
        recipe(tmp_path, {"kind": "on_policy", "teachers": {"math": "tiny-r1"}, "student_share": 0.5})
