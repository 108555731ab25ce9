"""A judge behind a server: grades, what costs a request, the ledger, failures, budgets; the filter; a benchmark."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from eval_support import distill, scores, server, url
from filter_support import add, make_recipe, make_trace

from distill import catalog
from distill.backends.budget import TEMPLATE_TOKENS
from distill.catalog import load_recipe
from distill.errors import UserError, WorkError
from distill.filters.pipeline import STAGE, check_gradable
from distill.grading import Grader
from distill.grading.judge import FIRST, JudgeModel, judge_identity, judge_price
from distill.grading.mixed import graded, require_judge
from distill.models import Launch, judge_of
from distill.prompts import Prompt
from distill.recipe import Judge, LocalEngine
from distill.recipe.rubric import Rubric
from distill.run import Run
from distill.traces.ledger import Ledger

TESTS = str(Path(__file__).resolve().parents[1])


def judge_settings(address: str, **more: Any) -> Judge:
    return Judge.model_validate({"server": {"url": address, "model": "scripted", "concurrency": 4}} | more)


def opened(address: str, directory: Path | None = None, **more: Any) -> JudgeModel:
    settings = judge_settings(address, **more)
    return JudgeModel(settings, judge_of(settings), LocalEngine(), directory)


def verdict(question: str, seed: int | None) -> Any:
    """Accept a response that holds the reference answer; say nothing of one that is `?`."""
    reference = question.split("Reference answer:\n")[1].split("\n")[0]
    response = question.split("Response:\n")[1].split("\n")[0]
    if response == "?":
        return "Hm.", "stop"
    return (f"I compare.\n\nJudgement: {'Yes' if reference in response else 'No'}"), "stop"


def prompt(answer: str | None = "Paris", question: str = "Capital of France?") -> Prompt:
    return Prompt.from_question(question, answer, "judge")


def test_grades(tmp_path: Path) -> None:
    items = [
        ("right", prompt(), "It is Paris."),
        ("wrong", prompt(), "It is Rome."),
        ("silent", prompt(), "?"),
        ("empty", prompt(), " \n"),
        ("no gold", prompt(None), "It is Paris."),
        ("long", prompt(), "Paris " * 50),
    ]
    with server(verdict) as made, opened(url(made), tmp_path / "j", max_characters=100) as judge:
        grades = dict(judge.grade(items))
        assert {name: (grade.verdict, grade.reason) for name, grade in grades.items()} == {
            "right": ("correct", "judged"),
            "wrong": ("wrong", "judged"),
            "silent": ("unverifiable", "no verdict"),
            "empty": ("unverifiable", "no answer found"),
            "no gold": ("unverifiable", "no gold answer"),
            "long": ("unverifiable", "too long to judge"),
        }
        assert len(made.asked) == 3, "only what can be judged costs a request"
        assert made.asked[0]["temperature"] == 0.0
        asked = next(each for each in made.asked if "Rome" in each["messages"][-1]["content"])
        assert "Capital of France?" in asked["messages"][-1]["content"]
    assert grades["right"].evidence == {
        "extracted": "It is Paris.",
        "gold": "Paris",
        "method": "response",
        "said": "Yes",
        "judgement": "I compare.\n\nJudgement: Yes",
    }


def test_nothing_is_judged_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = [(n, prompt(), f"It is {'Paris' if n % 2 else 'Rome'} ({n % 3}).") for n in range(12)]
    with server(verdict) as made:
        with opened(url(made), tmp_path) as judge:
            first = dict(judge.grade(items))
        assert len(made.asked) == 6, "an identical response to the same question is asked about once"
        with opened(url(made), tmp_path) as judge:
            assert dict(judge.grade(items)) == first
        assert len(made.asked) == 6
        with opened(url(made), tmp_path, seed=1) as judge:
            list(judge.grade(items[:1]))
        with opened(url(made), tmp_path) as judge:
            list(judge.grade(items[:1], Rubric(prompt="Response:\n{{response}}\nReference answer:\nRome\n")))
        assert len(made.asked) == 8, "another judge and another prompt are other questions"
    assert "judge: 6 new judgements; with earlier ones 6 prompt and 42 completion tokens" in capsys.readouterr().out
    assert len(list(Ledger(tmp_path / "judge.jsonl").rows())) == 8


def test_users_share_judgements(tmp_path: Path) -> None:
    settings = None
    with server(verdict) as made:
        settings = judge_settings(url(made))
        for user in ("filter-judge", "eval"):
            with JudgeModel(settings, judge_of(settings), LocalEngine(), tmp_path, user) as judge:
                list(judge.grade([(0, prompt(), "It is Paris.")]))
        assert len(made.asked) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["filter-judge.jsonl"]


def test_a_failure_is_no_verdict(tmp_path: Path) -> None:
    def failing(question: str, seed: int | None) -> Any:
        return 404 if "Rome" in question else verdict(question, seed)

    items = [(n, prompt(), f"It is {'Rome' if n == 2 else 'Paris'} ({n}).") for n in range(8)]
    grades: dict[int, Any] = {}
    with server(failing) as made, opened(url(made), tmp_path) as judge, pytest.raises(UserError):
        for key, grade in judge.grade(items):
            grades[key] = grade
    assert 2 not in grades and grades.keys() >= {0, 1}
    assert {grade.verdict for grade in grades.values()} == {"correct"}
    with server(verdict) as made, opened(url(made), tmp_path) as judge:
        assert dict(judge.grade(items))[2].verdict == "wrong"
        assert len(made.asked) == 8 - len(grades), "only what is missing is asked again"


def test_a_refused_response_is_undecided_and_the_others_are_judged(tmp_path: Path) -> None:
    def refusing(question: str, seed: int | None) -> Any:
        return 400 if "Rome" in question else verdict(question, seed)

    items = [(n, prompt(), f"It is {'Rome' if n in (2, 9) else 'Paris'} ({n}).") for n in range(12)]
    with server(refusing) as made, opened(url(made), tmp_path) as judge:
        grades = dict(judge.grade(items))
    assert {n: grade.verdict for n, grade in grades.items()} == {
        n: "unverifiable" if n in (2, 9) else "correct" for n in range(12)
    }
    assert grades[9].reason == "refused by the judge" and "scripted" in str(grades[9].evidence["refusal"])
    with server(verdict) as made, opened(url(made), tmp_path) as judge:
        assert dict(judge.grade(items))[2].verdict == "wrong", "a refusal is not stored"


def test_a_judge_that_refuses_all_ends_the_work(tmp_path: Path) -> None:
    items = [(n, prompt(), f"It is Paris ({n}).") for n in range(100)]
    with server(lambda question, seed: 400) as made, opened(url(made), tmp_path) as judge:
        with pytest.raises(UserError, match="the judge refuses every request: .*scripted") as ended:
            list(judge.grade(items))
        assert len(made.asked) <= 2 * FIRST and "\n" not in str(ended.value)


def test_a_budget_ends_the_work_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    items = [(n, prompt(), f"It is Paris ({n}).") for n in range(4)]
    limits = {"sampling": {"max_new_tokens": 10}, "prompt": "Response:\n{{response}}\nReference answer:\n{{answer}}\n"}
    question = len("Response:\nIt is Paris (0).\nReference answer:\nParis\n")
    need = question + TEMPLATE_TOKENS + 10  # the most that one judgement may take; it takes 8
    with server(verdict) as made:
        for budget, asked in ((need - 1, 0), (need + 10, 2), (2 * need, 4)):
            with opened(url(made), tmp_path, budget={"tokens": budget}, **limits) as judge:
                if asked < 4:
                    with pytest.raises(WorkError, match=r"the judge's budget is used up .* raise judge\.budget"):
                        list(judge.grade(items))
                else:
                    assert {grade.verdict for _, grade in judge.grade(items)} == {"correct"}
            assert len(made.asked) == asked


def test_many_answers_that_need_no_request_do_not_pile_up(tmp_path: Path) -> None:
    """The stream is read while answers are taken, not at once."""
    read = 0

    def items() -> Any:
        nonlocal read
        for n in range(20_000):
            read += 1
            yield n, prompt(), ""

    with server(verdict) as made, opened(url(made)) as judge:
        grades = judge.grade(items())
        next(grades)
        assert read < 2_000
        assert sum(1 for _ in grades) == 19_999
        assert made.asked == []


def test_streams_of_several_tasks(tmp_path: Path) -> None:
    items = [
        ("math", Prompt.from_question("1 + 1?", "2"), "\\boxed{2}"),
        ("judge", prompt(), "It is Paris."),
    ]
    with server(verdict) as made, opened(url(made)) as judge, Grader(workers=1) as grader:
        assert {key: grade.verdict for key, grade in graded(grader, judge, items)} == {
            "math": "correct",
            "judge": "correct",
        }
    with Grader(workers=1) as grader:
        assert [grade.reason for _, grade in graded(grader, None, items[1:])] == ["no judge"]
    with pytest.raises(UserError, match="benchmark x: task judge needs a model that judges; set `judge:`"):
        require_judge(["math", "judge"], False, "benchmark x")


def test_a_judge_may_be_a_card_a_directory_or_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Judge(teacher="tiny-r1")
    assert judge_of(tiny).place == catalog.resolve_weights("teacher", "tiny-r1")
    directory = Judge(teacher=str(catalog.resolve_weights("student", "tiny-qwen")))
    assert judge_of(directory).place == catalog.resolve_weights("student", "tiny-qwen")
    launched = Judge.model_validate({"teacher": "tiny-r1", "server": {"launch": "vllm"}})
    assert isinstance(judge_of(launched).place, Launch)
    assert judge_price(tiny) is None and judge_price(directory) is None
    assert judge_price(Judge(teacher="deepseek-r1")) == judge_price(Judge(teacher="deepseek-r1"))
    identity = judge_identity(tiny, judge_of(tiny))
    assert identity["sampling.temperature"] == 0.0 and "model.weights" in identity
    with pytest.raises(UserError, match="no teacher is named 'nobody'"):
        judge_of(Judge(teacher="nobody"))


def test_the_embedded_teacher_as_a_judge(tmp_path: Path) -> None:
    """Behind the local engine: its context bounds questions and judgements."""
    settings = Judge.model_validate({"teacher": "tiny-r1", "prompt": "What is 20 + 22? {{response}}", "max_batch": 4})
    settings = settings.model_copy(update={"accepted": ("42",), "sampling": settings.sampling})
    with JudgeModel(settings, judge_of(settings), LocalEngine(dtype="float32"), tmp_path) as judge:
        grades = dict(judge.grade([("short", prompt(None), "Compute it."), ("long", prompt(None), "a" * 3_000)]))
    assert (grades["long"].verdict, grades["long"].reason) == ("unverifiable", "too long to judge")
    (row,) = Ledger(tmp_path / "judge.jsonl").rows()
    assert grades["short"].evidence["judgement"] == row["text"][-300:]
    assert 0 < row["completion_tokens"] <= 2048 and row["prompt_tokens"] > 5


# ---- the filter


def judged_recipe(address: str, **filters: Any) -> Any:
    settings = {"format": False, "finish": False, "correct": False, "judge": True} | filters
    recipe = make_recipe(**{name: value for name, value in settings.items() if name != "judge"})
    data = recipe.model_dump(mode="json") | {"judge": {"server": {"url": address, "model": "scripted"}}}
    data["filter"]["judge"] = settings["judge"]
    return type(recipe).model_validate_json(json.dumps(data))


def liked(question: str, seed: int | None) -> Any:
    response = question.split("Response:\n")[1].split("\n")[0]
    return {"good": "Judgement: Yes", "bad": "Judgement: No"}.get(response, "Well."), "stop"


def traces() -> list[Any]:
    texts = ("good", "bad", "odd", "good")
    return [make_trace(f"<think>{n}</think>{text}", question=f"q{n}", sample=n) for n, text in enumerate(texts)]


def test_the_filter_keeps_what_the_judge_accepts(tmp_path: Path) -> None:
    with server(liked) as made:
        with Run(tmp_path / "run", judged_recipe(url(made))) as run:
            add(run.directory, traces())
            summary = STAGE.perform(run)
        assert summary.verdicts["judge"] == {"accepted": 2, "rejected": 1, "unverifiable: no verdict": 1}
        assert summary.kept == 2 and len(made.asked) == 4
        with Run(tmp_path / "run", judged_recipe(url(made))) as run:
            run.fresh([STAGE])
            assert STAGE.perform(run).kept == 2
        assert len(made.asked) == 4, "--fresh filter asks nothing again"
        recipe = judged_recipe(url(made), judge={"prompt": "Other.\nResponse:\n{{response}}\n"})
        with Run(tmp_path / "run", recipe) as run, pytest.raises(UserError, match=r"judge\.prompt"):
            STAGE.perform(run)
        changed = recipe.model_copy(
            update={"judge": judge_settings(url(made), seed=5), "filter": judged_recipe(url(made)).filter}
        )
        with Run(tmp_path / "run", changed) as run, pytest.raises(UserError, match=r"judge_model\.seed: 0 → 5"):
            STAGE.perform(run)


def test_a_recipe_with_the_filter_needs_a_judge(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="filter.judge needs `judge:`"):
        load_recipe("tiny", ["filter.judge=true"])
    rows = [{"kind": "file", "path": "x.jsonl", "task": "judge"}]
    with pytest.raises(UserError, match="filter.correct: task judge needs a model that judges"):
        check_gradable(make_recipe(prompts=rows))
    recipe = load_recipe("tiny", ["filter.judge=true", "judge={teacher: tiny-r1, budget: {cost: 1}}"])
    with pytest.raises(UserError, match=r"judge\.budget\.cost needs a price"):
        check_gradable(recipe)


def test_a_judge_is_not_asked_from_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its budget and its stored judgements are those of one process."""
    monkeypatch.setattr("distill.filters.pipeline.require_ray", lambda: None)
    with Run(tmp_path / "run", judged_recipe("http://127.0.0.1:9/v1"), on="ray") as run:
        add(run.directory, traces())
        with pytest.raises(UserError, match="--on ray: a judge is asked by one process"):
            STAGE.perform(run)


def main(address: str, directory: Path) -> None:
    with Run(directory, judged_recipe(address)) as run:
        STAGE.perform(run)


def test_a_killed_filter_pays_for_no_judgement_twice(tmp_path: Path) -> None:
    def slow(question: str, seed: int | None) -> Any:
        time.sleep(0.02)
        return liked(question, seed)

    with server(slow) as made:
        with Run(tmp_path / "run", judged_recipe(url(made))) as run:
            run.begin(STAGE, STAGE.settings(run), {})
            add(run.directory, [make_trace(f"<think>{n}</think>good {n}", question=f"q{n}") for n in range(150)])
        ledger = tmp_path / "run" / "judgements" / "filter.jsonl"
        with subprocess.Popen(
            [sys.executable, __file__, url(made), str(tmp_path / "run")], env=os.environ | {"PYTHONPATH": TESTS}
        ) as process:
            while process.poll() is None and not (ledger.exists() and ledger.stat().st_size > 5_000):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        stored = sum(1 for _ in Ledger(ledger).rows())
        assert 0 < stored < 150
        time.sleep(0.1)  # what was under way is answered
        before = len(made.asked)
        with Run(tmp_path / "run", judged_recipe(url(made))) as run, pytest.raises(UserError, match="nothing kept"):
            STAGE.perform(run)
        assert len(made.asked) - before == 150 - stored


def both(address: str, **judge: Any) -> Any:
    """A recipe whose answers the judge grades, and whose responses the filter `judge` shows it as well."""
    recipe = judged_recipe(address, correct=True, judge={"prompt": "{{response}}"})
    return recipe.model_copy(update={"judge": judge_settings(address, **judge)})


def judged_traces(count: int) -> list[Any]:
    prompts = [Prompt.from_question(f"q{n}", "good", "judge") for n in range(count)]
    return [make_trace(f"<think>{n}</think>good {n}", prompt=each) for n, each in enumerate(prompts)]


def from_run(recipe: Any, directory: Path) -> Any:
    """The recipe with the traces of another run, whose tasks it does not name."""
    data = recipe.model_dump(mode="json") | {"prompts": [], "traces": [{"kind": "run", "path": str(directory)}]}
    return type(recipe).model_validate_json(json.dumps(data))


def answered(question: str, seed: int | None) -> Any:
    return "Judgement: Yes", "stop"


@pytest.mark.slow
def test_one_budget_holds_for_all_filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both filters ask about 40 traces, at 8 tokens each. What both spend together stays within the budget, and a
    budget that suffices is not used up by what is under way."""
    monkeypatch.setattr("distill.grading.judge.ROUND", 16)
    monkeypatch.setattr("distill.grading.mixed.TOGETHER", 16)
    limits = {"sampling": {"max_new_tokens": 10}, "prompt": "{{response}} {{answer}}"}  # at most 300 tokens each
    with server(answered) as made:
        recipe = from_run(both(url(made), budget={"tokens": 500}, **limits), tmp_path)
        with Run(tmp_path / "run", recipe) as run:
            add(run.directory, judged_traces(40))
            with pytest.raises(WorkError, match=r"the judge's budget is used up"):
                STAGE.perform(run)
        rows = list(Ledger(tmp_path / "run" / "judgements" / "filter.jsonl").rows())
        spent = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
        assert len(rows) == len(made.asked) and 8 * len(made.asked) == spent <= 500
    with server(answered) as made:
        recipe = from_run(both(url(made), budget={"tokens": 80 * 8 + 300}, **limits), tmp_path)
        with Run(tmp_path / "other", recipe) as run:
            add(run.directory, judged_traces(40))
            assert STAGE.perform(run).verdicts["judge"] == {"accepted": 40}
        assert len(made.asked) == 80


# ---- tasks that the recipe does not name


def test_traces_of_another_run_bring_their_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the stored tasks they would be taken for mathematics: another judge would change nothing."""
    with server(answered) as made:
        recipe = from_run(judged_recipe(url(made), correct=True, judge=False), tmp_path)
        with Run(tmp_path / "run", recipe) as run:
            add(run.directory, judged_traces(2))
            assert STAGE.settings(run)["judge_model.model"] == "scripted"
            assert STAGE.perform(run).kept == 2
        other = recipe.model_copy(update={"judge": judge_settings(url(made), accepted=["no"], rejected=["yes"])})
        with Run(tmp_path / "run", other) as run, pytest.raises(UserError, match=r"judge_model\.accepted"):
            STAGE.perform(run)
        with Run(tmp_path / "none", recipe.model_copy(update={"judge": None})) as run:
            add(run.directory, judged_traces(2))
            with pytest.raises(UserError, match=r"filter\.correct: task judge needs a model that judges"):
                STAGE.perform(run)
    levels: list[str] = []
    monkeypatch.setattr("distill.filters.pipeline.require_level", lambda level, where: levels.append(level))
    with Run(tmp_path / "code", recipe) as run:
        add(run.directory, [make_trace(prompt=Prompt.from_question("q", "{}", "code"))])
        with pytest.raises(UserError, match="nothing kept"):
            STAGE.perform(run)
    assert levels == ["full"], "programs run at the level that the recipe asks for"


def test_a_judge_that_no_filter_asks_is_not_opened(tmp_path: Path) -> None:
    recipe = judged_recipe("http://127.0.0.1:9/v1", correct=True, judge=False)
    settings = judge_settings("http://127.0.0.1:9/v1")
    server_with_key = settings.server.model_copy(update={"api_key_env": "NOT_SET_ANYWHERE"})
    recipe = recipe.model_copy(update={"judge": settings.model_copy(update={"server": server_with_key})})
    with Run(tmp_path / "run", recipe) as run:
        add(run.directory, [make_trace()])
        assert STAGE.perform(run).kept == 1


# ---- a benchmark


def test_a_benchmark_that_a_judge_grades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    rows = [{"problem": f"Capital {n}?", "answer": "Paris"} for n in range(3)]
    path = tmp_path / "simpleqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def reply(question: str, seed: int | None) -> Any:
        if "Reference answer" in question:
            return verdict(question, seed)
        return {"Capital 0?": "Paris it is", "Capital 1?": "Rome", "Capital 2?": "?"}[question], "stop"

    with server(reply) as made:
        asked = ["eval", "--model", url(made), "--benchmark", "simpleqa", "--source", f"simpleqa={path}", "--limit", 3]
        asked += ["--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked) == 2
        assert "benchmark simpleqa: task judge needs a model that judges" in capsys.readouterr().err
        assert not (tmp_path / "out").exists() and made.asked == []
        judge = ["--set", f"judge.server={{url: {url(made)}, model: scripted}}"]
        assert distill(monkeypatch, *asked, *judge) == 0
        row = scores(tmp_path / "out", "simpleqa")
        assert (row.correct, row.unverifiable_rate) == (1, pytest.approx(1 / 3))
        assert row.grading["judge.model.model"] == "scripted" and "judge.prompt" in row.grading
        assert not any(key.startswith("judge.") for key in row.settings), "samples do not depend on the judge"
        assert len(made.asked) == 6
        assert distill(monkeypatch, *asked, *judge) == 0
        assert len(made.asked) == 6, "finished is finished"
        capsys.readouterr()
        assert distill(monkeypatch, *asked, *judge, "--set", "judge.seed=3") == 0
        assert (
            "its grades are of another grader (judge.seed: 0 → 3); grading its samples again" in capsys.readouterr().out
        )
        assert len(made.asked) == 9, "another judge is asked about the same samples"
        assert scores(tmp_path / "out", "simpleqa").grading["judge.seed"] == 3
        assert distill(monkeypatch, *asked, *judge) == 0
        assert len(made.asked) == 9, "the judgements of the first judge are still there"
        assert distill(monkeypatch, *asked, *judge, "--set", "judge.max_characters=8") == 0
        assert len(made.asked) == 9 and scores(tmp_path / "out", "simpleqa").correct == 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
