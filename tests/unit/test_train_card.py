"""The model card: what it says, and that it is a function of the run's records."""

import pytest
import train_support as support
import yaml

from distill.artefacts import EvalSummary, Interval, RunPaths, Scores
from distill.models import Models
from distill.train.student import card as cards


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    student = support.make_student(tmp_path_factory.mktemp("student"))
    directory = support.begin(tmp_path_factory.mktemp("runs") / "run", support.sums(12), student)
    support.train_here(directory, student, {"max_steps": 2, "adapter": {"kind": "lora", "r": 4}})
    return directory, support.make_recipe(student, {"max_steps": 2, "adapter": {"kind": "lora", "r": 4}})


def refreshed(trained):
    """(front matter, body) of the card after a refresh."""
    directory, recipe = trained
    cards.refresh(recipe, Models(recipe, directory).student_card, RunPaths(directory))
    _, header, body = (directory / "student" / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), body


def scores(model):
    half = Interval(value=0.5, low=0.4, high=0.6)
    known = {name: 0 for name in Scores.model_fields}
    return Scores.model_construct(
        **known | {"benchmark": "b", "model": model, "problems": 300, "samples_per_problem": 4, "pass_at_1": half}
    )


def test_tags_and_method_are_those_of_the_variants(trained):
    front, body = refreshed(trained)
    assert front["tags"] == ["distillation", "reasoning", "sft", "lora"]
    assert "| trained | LoRA, rank 4, alpha 32, merged |" in body and "model-index" not in front


def test_a_card_that_was_lost_or_changed_comes_back(trained):
    directory, _ = trained
    path = directory / "student" / "README.md"
    refreshed(trained)
    before = path.read_bytes()
    changed = path.stat().st_mtime_ns
    refreshed(trained)
    assert path.stat().st_mtime_ns == changed, "the same card is not written again"
    path.unlink()
    refreshed(trained)
    assert path.read_bytes() == before
    path.write_text("stale")
    refreshed(trained)
    assert path.read_bytes() == before


def test_scores_of_the_student_go_into_the_front_matter(trained, monkeypatch):
    plain_front, plain_body = refreshed(trained)
    evaluated = EvalSummary.model_construct(scores=(scores("base"), scores("student")), comparisons=(), published=())
    summary = cards.summary
    with monkeypatch.context() as patch:
        patch.setattr(
            cards, "summary", lambda paths, name, model: evaluated if name == "eval" else summary(paths, name, model)
        )
        front, body = refreshed(trained)
    (result,) = front.pop("model-index")[0]["results"]
    assert result["metrics"] == [
        {"type": "pass@1", "name": "pass@1, 300 problems × 4 (95 %: 40.0 to 60.0)", "value": 50.0}
    ]
    assert (front, body) == (plain_front, plain_body)


def test_before_training_has_finished_there_is_no_card(tmp_path):
    student = support.make_student(tmp_path / "student")
    directory = support.begin(tmp_path / "run", support.sums(2), student)
    recipe = support.make_recipe(student)
    cards.refresh(recipe, Models(recipe, directory).student_card, RunPaths(directory))
    assert not (directory / "student").exists()
