"""The evaluation stage with scripted models: what is drawn, graded, scored, resumed, extended and refused."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distill.artefacts import GenerateSummary
from distill.backends import Completed, Usage
from distill.errors import UserError
from distill.eval import EvalStage
from distill.evaluations import LABELS, EvaluationPaths, read_grades, read_results
from distill.grading import identity
from distill.recipe import Recipe
from distill.run import Run

PROBLEMS = 12


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


class Scripted:
    """Models that answer as `answer(model, question, gold, sample)` says; they count what they were asked."""

    usage = Usage()

    def __init__(self, answer, die_after=None, max_context=None):
        self.numerics, self.max_context = {"engine": "scripted"}, max_context
        self.sampled_with = set()
        self.answer, self.die_after = answer, die_after
        self.drawn, self.loaded, self.in_memory, self.asked = [], [], 0, []

    @contextmanager
    def open(self, model, engine, max_batch) -> Iterator["Scripted"]:
        self.loaded.append(model.name)
        self.in_memory += 1
        assert self.in_memory == 1, "one model at a time"
        self.identity = model.identity
        yield self
        self.in_memory -= 1

    def check(self, prompts, sampling):
        pass

    def complete(self, jobs, sampling, seed, allowance=None):
        self.sampled_with.add(sampling.max_new_tokens)
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
def recipe(tmp_path, monkeypatch):
    """A recipe whose cards, problems and (empty) weights lie in tmp_path."""
    monkeypatch.setattr("distill.eval.evaluation.length_function", lambda model: lambda text: len(text.split()))
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
            run.begin(Trained, {}, {})
            _model(directory / "student", b"trained")
            run.finish(Trained, NOTHING)
    changed = recipe.model_copy(update={"eval": recipe.eval.model_copy(update=eval_settings)})
    with Run(directory, changed) as run:
        return {(row.benchmark, row.model): row for row in EvalStage(scripted.open).perform(run, [Trained]).scores}


class Trained:
    """Stands for the train stage."""

    name, outputs, products, summary = "train", ("student",), ("student/*",), GenerateSummary


NOTHING = GenerateSummary(
    traces=0,
    content_hash="",
    prompts=0,
    truncated=0,
    completion_tokens=0,
    median_completion_tokens=0,
    made=0,
    seconds=0,
)


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
    assert {model: row.pass_at_1.value for (_, model), row in rows.items()} == {"base": 0, "student": 0.5, "teacher": 1}
    assert models.loaded == ["base", "student", "teacher"]
    assert len(models.drawn) == 3 * PROBLEMS * 2
    assert models.asked[0] == "What is 0 + 0? Box it."

    base, student = rows["sums", "base"], rows["sums", "student"]
    assert (base.truncated_rate, base.no_answer_rate) == (0.5, 0.5)
    assert (base.problems, base.samples, base.samples_per_problem) == (PROBLEMS, 2 * PROBLEMS, 2)
    assert (student.median_reasoning_tokens, base.median_reasoning_tokens) == (2, 2)  # 4 words, and none, halved
    results = read_results(tmp_path / "run/eval/sums/student")
    assert results.scores == student
    assert results.scores.settings["sampling.max_new_tokens"] == 8
    assert results.scores.settings["model.numerics.engine"] == "scripted"
    assert len(str(results.scores.settings["model.weights"])) == 16
    assert list(results.correct.values()) == [[True, False]] * PROBLEMS


def test_the_table_is_printed(tmp_path, recipe, capsys):
    score(tmp_path, recipe, Scripted(knows))
    printed = capsys.readouterr().out
    assert "Scores on sums, 12 problems × 2" in printed
    assert "100.0%" in printed
    assert "no answer: no final answer was found in the response" in printed
    assert "unverifiable: no verdict" in printed and max(map(len, LABELS)) <= 80
    noted = " ".join(printed.split())
    assert "note: 50.0% of the samples of base are unverifiable and count as not correct; `distill traces" in noted
    assert noted.count("are unverifiable and") == 1, "the student's answers have verdicts"


def test_finished_is_finished(tmp_path, recipe):
    first = score(tmp_path, recipe, Scripted(knows))
    again = Scripted(knows)
    assert score(tmp_path, recipe, again) == first
    assert again.loaded == []


def with_sympy(monkeypatch, number):
    true = identity.version
    monkeypatch.setattr(identity, "version", lambda name: number if name == "sympy" else true(name))


def test_an_upgrade_of_the_grader_s_packages_grades_a_finished_stage_again(tmp_path, recipe, monkeypatch, capsys):
    """All models, so that none is compared with another one's grader; no sample is drawn."""
    with monkeypatch.context() as earlier:
        with_sympy(earlier, "1.0")
        first = score(tmp_path, recipe, Scripted(knows))
    assert {row.versions["sympy"] for row in first.values()} == {"1.0"}
    with_sympy(monkeypatch, "2.0")
    again = Scripted(knows)
    assert {row.versions["sympy"] for row in score(tmp_path, recipe, again).values()} == {"2.0"} and again.loaded == []
    assert "grades are of another grader (math.sympy: 1.0 → 2.0)" in capsys.readouterr().out


def test_another_file_is_another_evaluation(tmp_path, recipe):
    """Finished is what was asked of this file; what its problems share with the last one's is not drawn again."""
    card = str(tmp_path / "sums.yaml")
    score(tmp_path, recipe, Scripted(knows), benchmarks=(card,))
    rows = [{"question": f"What is {n} + 0?", "answer": str(n)} for n in range(PROBLEMS - 2, PROBLEMS + 1)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = Scripted(knows)
    found = score(tmp_path, recipe, others, benchmarks=(card,), sources={"sums": str(tmp_path / "others.jsonl")})
    assert found["sums", "teacher"].problems == 3
    assert len(others.drawn) == 3 * 2, "two samples of the one new problem, by each model"


@pytest.mark.parametrize("die_after", [0, 1, 2 * PROBLEMS, 2 * PROBLEMS + 5, 6 * PROBLEMS - 1])
def test_a_killed_evaluation_draws_only_what_is_missing(tmp_path, recipe, die_after):
    killed, rest = Scripted(knows, die_after), Scripted(knows)
    with pytest.raises(Killed):
        score(tmp_path, recipe, killed)
    rows = score(tmp_path, recipe, rest)
    assert sorted(killed.drawn + rest.drawn) == sorted(set(killed.drawn + rest.drawn))
    assert len(killed.drawn + rest.drawn) == 6 * PROBLEMS
    assert rows["sums", "student"].pass_at_1.value == 0.5


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["grades.jsonl", "votes.jsonl", "scores.json", "record.json", "settings.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_files_are_made_again(tmp_path, recipe, name, damage):
    """Only a lost settings.json needs the model, to compare its samples' hash of settings; nothing is drawn again."""
    first = score(tmp_path, recipe, Scripted(knows))
    path = tmp_path / "run/eval/sums/teacher" / name
    damaged(path, damage)
    again = Scripted(knows)
    assert score(tmp_path, recipe, again) == first
    assert again.drawn == [] and again.loaded == (["teacher"] if name == "settings.json" else [])
    assert read_results(path.parent).scores == first["sums", "teacher"]


def damaged(path: Path, damage: str) -> None:
    """Cut a file in half, change a digit without changing its size, or remove it."""
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        at = next(i for i in range(len(content) // 2, len(content)) if content[i : i + 1].isdigit())
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_samples_are_drawn_again_and_graded_anew(tmp_path, recipe, damage):
    """Also where the model says something else the second time: no old grade is kept for a new text."""
    score(tmp_path, recipe, Scripted(knows), models=("student",))
    damaged(next((tmp_path / "run/eval/sums/student/traces").glob("*.parquet")), damage)
    worse = Scripted(lambda model, gold, sample: "The answer is -1.")
    rows = score(tmp_path, recipe, worse, models=("student",))
    assert len(worse.drawn) == 2 * PROBLEMS and rows["sums", "student"].pass_at_1.value == 0


def test_damage_is_found_when_more_samples_are_asked_for(tmp_path, recipe):
    score(tmp_path, recipe, Scripted(knows), models=("teacher",), samples=1)
    grades = tmp_path / "run/eval/sums/teacher/grades.jsonl"
    grades.write_bytes(b"".join(grades.read_bytes().splitlines(keepends=True)[: PROBLEMS // 2]))
    more = Scripted(knows)
    assert score(tmp_path, recipe, more, models=("teacher",), samples=2)["sums", "teacher"].pass_at_1.value == 1
    assert len(more.drawn) == PROBLEMS and (tmp_path / "run/old/damaged-1/eval/sums/teacher/grades.jsonl").is_file()


def test_samples_without_their_settings_are_not_mixed_with_others(tmp_path, recipe):
    """settings.json is lost and the card has another temperature: the hash in the samples tells."""
    score(tmp_path, recipe, Scripted(knows), models=("teacher",))
    (tmp_path / "run/eval/sums/teacher/settings.json").unlink()
    card = tmp_path / "sums.yaml"
    card.write_text(card.read_text().replace("max_new_tokens: 8", "max_new_tokens: 8, temperature: 0.1"))
    again = Scripted(knows)
    with pytest.raises(
        UserError, match=r"settings\.json is missing or damaged.*drawn with other settings.*--fresh eval"
    ):
        score(tmp_path, recipe, again, models=("teacher",))
    assert again.drawn == []


def test_an_evaluation_is_not_finished_while_it_is_extended(tmp_path, recipe):
    score(tmp_path, recipe, Scripted(knows), models=("teacher",), samples=1)
    with pytest.raises(Killed):
        score(tmp_path, recipe, Scripted(knows, die_after=3), models=("teacher",), samples=2)
    assert not EvaluationPaths(tmp_path / "run/eval/sums/teacher").record.exists()
    with pytest.raises(
        UserError, match=r"record\.json is missing; `distill eval .*recipe\.yaml --run-dir .*` recreates it"
    ):
        read_results(tmp_path / "run/eval/sums/teacher")


def test_more_samples_models_and_benchmarks_extend_it(tmp_path, recipe):
    few, more, other = Scripted(knows), Scripted(knows), Scripted(knows)
    assert list(score(tmp_path, recipe, few, models=("student",), samples=1, limit=5)) == [("sums", "student")]
    assert len(few.drawn) == 5
    rows = score(tmp_path, recipe, more, models=("student", "teacher"), samples=2)
    assert len(more.drawn) == 4 * PROBLEMS - 5
    assert rows["sums", "student"].pass_at_1.value == 0.5
    benchmarks = (*recipe.eval.benchmarks, str(tmp_path / "more.yaml"))
    rows = score(tmp_path, recipe, other, models=("student", "teacher"), benchmarks=benchmarks)
    assert list(rows) == [("sums", "student"), ("sums", "teacher"), ("more", "student"), ("more", "teacher")]
    assert len(other.drawn) == 2 * PROBLEMS


def test_fewer_samples_score_fewer(tmp_path, recipe):
    score(tmp_path, recipe, Scripted(knows), models=("student",))
    again = Scripted(knows)
    rows = score(tmp_path, recipe, again, models=("student",), samples=1, limit=5)
    assert rows["sums", "student"].pass_at_1.value == 1 and again.drawn == []
    directory = tmp_path / "run/eval/sums/student"
    results, grades = read_results(directory), read_grades(EvaluationPaths(directory).grades)
    assert len(grades) == 2 * PROBLEMS, "the others are kept"
    assert [len(rows) for rows in results.samples.values()] == [1] * 5, "and not counted"


@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_student_is_named_and_not_taken_for_another(tmp_path, recipe, finished):
    if finished:
        score(tmp_path, recipe, Scripted(knows))
    else:
        with pytest.raises(Killed):
            score(tmp_path, recipe, Scripted(knows, die_after=3))
    weights = tmp_path / "run/student/model.safetensors"
    for damage in (lambda: weights.write_bytes(b"trainee"), weights.unlink):
        damage()
        again = Scripted(knows)
        with pytest.raises(UserError, match=r"model\.safetensors (has changed|is missing).*; `distill train"):
            score(tmp_path, recipe, again)
        assert again.drawn == []


def test_a_student_trained_anew_is_not_mixed_with_the_old_one(tmp_path, recipe):
    score(tmp_path, recipe, Scripted(knows))
    with Run(tmp_path / "run", recipe) as run:
        run.begin(Trained, {}, {})
        _model(tmp_path / "run/student", b"trained again")
        run.finish(Trained, NOTHING)
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
        EvalStage(Scripted(knows).open).perform(run)
    assert not (tmp_path / "run").exists()


def test_two_cards_of_one_name_are_refused(tmp_path, recipe):
    (tmp_path / "copy.yaml").write_text((tmp_path / "sums.yaml").read_text())
    with pytest.raises(UserError, match="two cards have the name sums"):
        score(tmp_path, recipe, Scripted(knows), benchmarks=(*recipe.eval.benchmarks, str(tmp_path / "copy.yaml")))


def test_problems_without_a_grader_are_refused(tmp_path, recipe):
    card = tmp_path / "sums.yaml"
    card.write_text(card.read_text().replace("problems.jsonl", "problems.jsonl, task: chat"))
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
    assert (row.pass_at_1.value, row.problems, row.no_answer_rate) == (1, 50, 0)
    assert row.pass_at_1.low == pytest.approx(1 - 3.8415 / 53.8415, abs=1e-4)


class Words:
    """A tokenizer whose tokens are words."""

    def prompt_ids(self, messages):
        return messages[-1]["content"].split()

    def prompts_ids(self, conversations):
        return map(self.prompt_ids, conversations)

    def text_ids(self, text):
        return text.split()


def test_max_new_tokens_is_reduced_to_the_models_context(tmp_path, recipe, monkeypatch, capsys):
    """`What is n + 0? Box it.` has seven words: a context of 12 has room for five and not for the card's eight."""
    monkeypatch.setattr("distill.models.Model.chat", Words())
    first = Scripted(knows, max_context=12)
    row = score(tmp_path, recipe, first, models=("student",), limit=5)["sums", "student"]
    assert first.sampled_with == {5} and row.settings["sampling.max_new_tokens"] == 5
    assert row.settings["sampling.max_new_tokens_asked"] == 8
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "max_new_tokens is reduced from 8 to 5, which with the longest prompt fills the model's context of 12"
        in printed
    )
    more = Scripted(knows, max_context=12)
    score(tmp_path, recipe, more, models=("student",))
    assert more.sampled_with == {5} and len(more.drawn) == 2 * (PROBLEMS - 5), "more problems are answered alike"
    same = Scripted(knows, max_context=12)
    score(tmp_path, recipe, same, models=("student",), max_new_tokens=5)
    assert same.drawn == [], "asking for what was used is no other setting"
    with pytest.raises(UserError, match=r"sampling\.max_new_tokens: 5 → 4"):
        score(tmp_path, recipe, Scripted(knows, max_context=12), models=("student",), max_new_tokens=4)


def test_a_longer_problem_that_leaves_less_room_is_not_mixed_in(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr("distill.models.Model.chat", Words())
    score(tmp_path, recipe, Scripted(knows, max_context=12), models=("student",))
    with (tmp_path / "problems.jsonl").open("a") as file:
        file.write(json.dumps({"question": "What, now, is 99 + 0?", "answer": "99"}) + "\n")
    longer = Scripted(knows, max_context=12)
    with pytest.raises(UserError, match=r"sampling\.max_new_tokens: 5 → 4"):
        score(tmp_path, recipe, longer, models=("student",))
    assert longer.drawn == []


def test_a_context_that_is_large_enough_changes_nothing(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr("distill.models.Model.chat", Words())
    models = Scripted(knows, max_context=15)
    settings = score(tmp_path, recipe, models, models=("student",))["sums", "student"].settings
    assert models.sampled_with == {8} and "sampling.max_new_tokens_asked" not in settings
