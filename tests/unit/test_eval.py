"""The evaluation stage with scripted models: what is drawn, graded, scored, resumed, extended and refused."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distill.backends import Completed
from distill.errors import UserError
from distill.eval import evaluate
from distill.recipe import Recipe
from distill.run import Run

PROBLEMS = 12


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


class Scripted:
    """Models that answer as `answer(model, question, gold, sample)` says; they count what they were asked."""

    def __init__(self, answer, die_after=None):
        self.answer, self.die_after = answer, die_after
        self.drawn, self.loaded, self.in_memory, self.asked = [], [], 0, []

    @contextmanager
    def backend(self, contender) -> Iterator["Scripted"]:
        self.loaded.append(contender.name)
        self.in_memory += 1
        assert self.in_memory == 1, "one model at a time"
        self.identity = contender.identity | {"numerics": "scripted"}
        yield self
        self.in_memory -= 1

    def token_counter(self, contender):
        return lambda text: len(text.split())

    def check(self, prompts, sampling):
        pass

    def complete(self, jobs, sampling, seed):
        for job in jobs:
            for sample in job.samples:
                if self.die_after is not None and len(self.drawn) == self.die_after:
                    raise Killed
                self.drawn.append((self.loaded[-1], job.prompt.id, sample, seed))
                self.asked.append(job.prompt.messages[-1]["content"])
                text = self.answer(self.loaded[-1], job.prompt.answer, sample)
                finish = "stop" if text.endswith(".") else "length"
                yield Completed(job.prompt, sample, text, finish, (1, 2), tuple(range(len(text.split()))))


def knows(model, gold, sample):
    """The teacher is always right, the student on its first sample, the base never, and at times it does not end."""
    if model == "teacher":
        return f"<think>\none two three\n</think>\nThe answer is {gold}."
    if model == "student":
        return f"<think>\none two\n</think>\nThe answer is {gold if sample == 0 else '-1'}."
    return "<think>\nround and round and" if int(gold) % 2 else "The answer is -1."


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose cards, problems and (empty) weights lie in tmp_path."""
    (tmp_path / "problems.jsonl").write_text(
        "".join(json.dumps({"question": f"What is {n} + 0?", "answer": str(n)}) + "\n" for n in range(PROBLEMS))
    )
    card = f"""
        name: sums
        prompts: {{kind: file, path: {tmp_path}/problems.jsonl}}
        prompt_suffix: " Box it."
        samples: 2
        sampling: {{max_new_tokens: 8}}
    """
    (tmp_path / "sums.yaml").write_text(card)
    (tmp_path / "more.yaml").write_text(card.replace("name: sums", "name: more").replace("samples: 2", "samples: 1"))
    for name in ("student", "teacher"):
        _model(tmp_path / name)
        family = "qwen2" if name == "student" else "deepseek_v3\nactive_parameters: 1"
        (tmp_path / f"{name}.yaml").write_text(
            f"name: {name}\nfamily: {family}\nweights: {name}\nparameters: 1\ncontext: 512\nlicense: mit\n"
        )
    return Recipe.model_validate(
        {
            "name": "small",
            "teacher": str(tmp_path / "teacher.yaml"),
            "student": str(tmp_path / "student.yaml"),
            "prompts": [{"kind": "procedural", "name": "arithmetic"}],
            "eval": {"benchmarks": [str(tmp_path / "sums.yaml")]},
        }
    )


def _model(directory: Path, weights: bytes = b"weights") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(weights)


def score(tmp_path, recipe, scripted, **eval_settings):
    """One `distill eval`: {(benchmark, model): scores}."""
    directory = tmp_path / "run"
    if not (directory / "student").exists():
        with Run(directory, recipe) as run:
            run.stage("train", {}, {}, ["student"]).finish({})
        _model(directory / "student", b"trained")
    changed = recipe.model_copy(update={"eval": recipe.eval.model_copy(update=eval_settings)})
    with Run(directory, changed) as run:
        return {(row["benchmark"], row["model"]): row for row in evaluate(run, scripted)["scores"]}


def test_published_scores_can_be_asked_for_afterwards(tmp_path, recipe, capsys):
    score(tmp_path, recipe, Scripted(knows))
    card = tmp_path / "sums.yaml"
    card.write_text(card.read_text().rstrip() + "\n        published: {Somebody: {pass@1: 50}}\n")
    again = Scripted(knows)
    capsys.readouterr()
    score(tmp_path, recipe, again, published="Somebody")
    assert again.drawn == [], "nothing is drawn for it"
    assert "published for Somebody: pass@1 50.0%, inside the interval of student" in capsys.readouterr().out


def test_three_models_side_by_side(tmp_path, recipe):
    models = Scripted(knows)
    rows = score(tmp_path, recipe, models)
    assert {model: row["pass@1"] for (_, model), row in rows.items()} == {"base": 0, "student": 0.5, "teacher": 1}
    assert models.loaded == ["base", "student", "teacher"]
    assert len(models.drawn) == 3 * PROBLEMS * 2
    assert models.asked[0] == "What is 0 + 0? Box it."

    base, student = rows["sums", "base"], rows["sums", "student"]
    assert (base["truncated_rate"], base["no_answer_rate"]) == (0.5, 0.5)
    assert (base["problems"], base["samples"], base["samples_per_problem"]) == (PROBLEMS, 2 * PROBLEMS, 2)
    assert (student["median_reasoning_tokens"], base["median_reasoning_tokens"]) == (2, 2)  # 4 words, and none, halved
    on_disk = json.loads((tmp_path / "run/eval/sums/student/scores.json").read_text())
    assert on_disk == student
    assert on_disk["settings"]["sampling.max_new_tokens"] == 8
    assert on_disk["settings"]["model.numerics"] == "scripted"
    assert len(on_disk["settings"]["model.weights"]) == 16


def test_the_table_is_printed(tmp_path, recipe, capsys):
    score(tmp_path, recipe, Scripted(knows))
    printed = capsys.readouterr().out
    assert "Scores on sums, 12 problems × 2" in printed
    assert "100.0%" in printed


def test_finished_is_finished(tmp_path, recipe):
    first = score(tmp_path, recipe, Scripted(knows))
    again = Scripted(knows)
    assert score(tmp_path, recipe, again) == first
    assert again.loaded == []


def test_another_file_is_another_evaluation(tmp_path, recipe):
    """Finished is what was asked of this file; what its problems share with the last one's is not drawn again."""
    card = str(tmp_path / "sums.yaml")
    score(tmp_path, recipe, Scripted(knows), benchmarks=(card,))
    rows = [{"question": f"What is {n} + 0?", "answer": str(n)} for n in range(PROBLEMS - 2, PROBLEMS + 1)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = Scripted(knows)
    found = score(tmp_path, recipe, others, benchmarks=(card,), sources={"sums": str(tmp_path / "others.jsonl")})
    assert found["sums", "teacher"]["problems"] == 3
    assert len(others.drawn) == 3 * 2, "two samples of the one new problem, by each model"


@pytest.mark.parametrize("die_after", [0, 1, 2 * PROBLEMS, 2 * PROBLEMS + 5, 6 * PROBLEMS - 1])
def test_a_killed_evaluation_draws_only_what_is_missing(tmp_path, recipe, die_after):
    killed, rest = Scripted(knows, die_after), Scripted(knows)
    with pytest.raises(Killed):
        score(tmp_path, recipe, killed)
    rows = score(tmp_path, recipe, rest)
    assert sorted(killed.drawn + rest.drawn) == sorted(set(killed.drawn + rest.drawn))
    assert len(killed.drawn + rest.drawn) == 6 * PROBLEMS
    assert rows["sums", "student"]["pass@1"] == 0.5


def test_grades_that_were_lost_are_made_again_without_a_model(tmp_path, recipe):
    first = score(tmp_path, recipe, Scripted(knows))
    state = tmp_path / "run/stages/eval.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"finished": None, "summary": None}))
    grades = tmp_path / "run/eval/sums/teacher/grades.jsonl"
    grades.write_bytes(grades.read_bytes()[:-7])  # the last row is cut off
    again = Scripted(knows)
    assert score(tmp_path, recipe, again) == first
    assert again.loaded == []


def test_more_samples_models_and_benchmarks_extend_it(tmp_path, recipe):
    few, more, other = Scripted(knows), Scripted(knows), Scripted(knows)
    assert list(score(tmp_path, recipe, few, models=("student",), samples=1, limit=5)) == [("sums", "student")]
    assert len(few.drawn) == 5
    rows = score(tmp_path, recipe, more, models=("student", "teacher"), samples=2)
    assert len(more.drawn) == 4 * PROBLEMS - 5
    assert rows["sums", "student"]["pass@1"] == 0.5
    benchmarks = (*recipe.eval.benchmarks, str(tmp_path / "more.yaml"))
    rows = score(tmp_path, recipe, other, models=("student", "teacher"), benchmarks=benchmarks)
    assert list(rows) == [("sums", "student"), ("sums", "teacher"), ("more", "student"), ("more", "teacher")]
    assert len(other.drawn) == 2 * PROBLEMS


def test_fewer_samples_score_fewer(tmp_path, recipe):
    score(tmp_path, recipe, Scripted(knows), models=("student",))
    again = Scripted(knows)
    assert score(tmp_path, recipe, again, models=("student",), samples=1)["sums", "student"]["pass@1"] == 1
    assert again.drawn == []


def test_a_student_trained_anew_is_not_mixed_with_the_old_one(tmp_path, recipe):
    score(tmp_path, recipe, Scripted(knows))
    _model(tmp_path / "run/student", b"trained again")
    again = Scripted(knows)
    with pytest.raises(UserError, match=r"eval/sums/student.*model\.weights.*--fresh eval"):
        score(tmp_path, recipe, again)
    assert again.drawn == []


def test_other_sampling_is_refused_and_named(tmp_path, recipe):
    score(tmp_path, recipe, Scripted(knows))
    card = tmp_path / "sums.yaml"
    card.write_text(card.read_text().replace("max_new_tokens: 8", "max_new_tokens: 9"))
    with pytest.raises(UserError, match=r"sampling\.max_new_tokens: 8 → 9"):
        score(tmp_path, recipe, Scripted(knows))


def test_another_seed_is_refused(tmp_path, recipe):
    score(tmp_path, recipe, Scripted(knows))
    with pytest.raises(UserError, match="seed: 1 → 2"):
        score(tmp_path, recipe, Scripted(knows), seed=2)


def test_without_a_student_nothing_is_written(tmp_path, recipe):
    with pytest.raises(UserError, match="distill train"), Run(tmp_path / "run", recipe) as run:
        evaluate(run, Scripted(knows))
    assert not (tmp_path / "run").exists()


def test_two_cards_of_one_name_are_refused(tmp_path, recipe):
    (tmp_path / "copy.yaml").write_text((tmp_path / "sums.yaml").read_text())
    with pytest.raises(UserError, match="one name"):
        score(tmp_path, recipe, Scripted(knows), benchmarks=(*recipe.eval.benchmarks, str(tmp_path / "copy.yaml")))


def test_problems_without_a_grader_are_refused(tmp_path, recipe):
    card = tmp_path / "sums.yaml"
    card.write_text(card.read_text().replace("problems.jsonl", "problems.jsonl, task: code"))
    models = Scripted(knows)
    with pytest.raises(UserError, match="leave sums out"):
        score(tmp_path, recipe, models)
    assert models.drawn == []
    assert not (tmp_path / "run/eval").exists()


def test_reference_answers_of_real_problems_score_everything(tmp_path, recipe, real_data):
    card = tmp_path / "sums.yaml"
    card.write_text(card.read_text().replace(f"{tmp_path}/problems.jsonl", str(real_data("gsm8k/test.jsonl"))))
    right = Scripted(lambda model, gold, sample: f"<think>\nI know.\n</think>\n{gold}.")
    row = score(tmp_path, recipe, right, models=("student",), samples=1, limit=50)["sums", "student"]
    assert (row["pass@1"], row["problems"], row["no_answer_rate"]) == (1, 50, 0)
    assert row["pass@1_low"] == pytest.approx(1 - 3.8415 / 53.8415, abs=1e-4)
