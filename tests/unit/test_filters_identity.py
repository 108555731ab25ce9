"""What decides verdicts besides the recipe and the traces: versions of filters and graders, contents of benchmarks."""

import json
from pathlib import Path
from typing import Any

import pytest
from filter_support import add, make_recipe, make_trace, run_filter

from distill import catalog
from distill.errors import UserError
from distill.filters.correct import Correct
from distill.filters.finish import Finish
from distill.filters.pipeline import STAGE
from distill.filters.resources import judges_identity
from distill.grading.code import CodeGrader
from distill.grading.graders import GRADERS
from distill.grading.identity import changes, graders_identity
from distill.grading.math import MathGrader
from distill.grading.sandbox import levels
from distill.pipeline import run_recipe
from distill.prompts import Prompt
from distill.run import Run
from distill.traces.ledger import Ledger


def numbered(start: int, stop: int) -> list[Any]:
    return [make_trace(f"<think>{n}</think>\\boxed{{42}} ({n})", question=f"q{n}") for n in range(start, stop)]


def wrong(patch: pytest.MonkeyPatch, version: int) -> None:
    """Another version of the grader of mathematics, which calls everything wrong."""
    patch.setattr(MathGrader, "version", version)
    patch.setattr(MathGrader, "rule", lambda self, gold, answer: ("wrong", "scripted"))


def at_level(patch: pytest.MonkeyPatch, level: str) -> None:
    patch.setattr(levels, "this_machine", lambda: (level, {}, ()))


def judged_by(run: Path) -> set[str]:
    return {row["judged_by"] for row in Ledger(run / "filtered" / "verdicts.jsonl").rows()}


def test_an_identity_names_versions_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    at_level(monkeypatch, "full")
    identity = graders_identity(["math", "code", "chat"])
    assert identity.keys() == {"math.version", "math.sympy", "code.version", "code.python"}
    assert all(identity.values()) and identity["code.python"].count(".") == 2
    monkeypatch.setattr(MathGrader, "packages", ("no-such-package",))
    assert graders_identity(["math"])["math.no-such-package"] is None
    assert changes({"a": 1, "b": 2}, {"a": 3}) == "a: 1 → 3, b: 2 → not set"
    assert judges_identity(make_recipe(language=True), ["math"])["filter.language.py3langid"]
    assert "math.version" not in judges_identity(make_recipe(correct=False), ["math"]), "nothing is graded"
    for grader in GRADERS.values():
        assert grader.version >= 1 and isinstance(grader.packages, tuple)


@pytest.mark.parametrize("part", ["a finished stage", "a stage that is extended", "a stage that was interrupted"])
def test_verdicts_of_another_version_are_given_again(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as earlier:
        wrong(earlier, 0)
        with Run(run, make_recipe()) as made:
            add(run, numbered(0, 4))
            with pytest.raises(UserError, match="nothing kept of 4 traces"):
                STAGE.perform(made)
    if part != "a stage that was interrupted":
        capsys.readouterr()
        assert run_filter(run).kept == 4, "the first session ended with an error, so the stage is finished here"
        assert "4 traces had verdicts of other versions of the filters or graders" in capsys.readouterr().out
        with monkeypatch.context() as later:
            wrong(later, 99)
            added = numbered(4, 6) if part == "a stage that is extended" else []
            with pytest.raises(UserError, match=f"nothing kept of {4 + len(added)} traces"):
                run_filter(run, added)
    assert run_filter(run).kept == (6 if part == "a stage that is extended" else 4)
    assert len(judged_by(run)) == 1


def test_a_finished_stage_stays_finished_while_versions_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_filter(tmp_path / "run", numbered(0, 3))
    with Run(tmp_path / "run", make_recipe()) as run:
        assert STAGE.is_finished(run)
        monkeypatch.setattr(GRADERS["code"].__class__, "version", 99)
        assert STAGE.is_finished(run), "no trace is of that task"
        monkeypatch.setattr(Finish, "version", 99)
        assert not STAGE.is_finished(run)
    assert Correct.version == 1


def test_verdicts_without_a_version_are_given_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As an earlier version of distill left them."""
    run = tmp_path / "run"
    run_filter(run, numbered(0, 3))
    path = run / "filtered" / "verdicts.jsonl"
    rows = [{key: value for key, value in row.items() if key != "judged_by"} for row in Ledger(path).rows()]
    path.unlink()
    with Ledger(path) as ledger:
        ledger.append(rows)
    assert run_filter(run, numbered(3, 5)).kept == 5
    assert "3 traces had verdicts of other versions" in capsys.readouterr().out
    assert len(judged_by(run)) == 1


# ---- isolation


def test_the_level_of_isolation_is_part_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """`full` is left out, as it was before the level was recorded: such verdicts stay valid."""
    identities = {}
    for level in levels.LEVELS:
        at_level(monkeypatch, level)
        identities[level] = graders_identity(["code", "math"])
    assert identities["process"] == identities["full"] | {"code.level": "process"}
    assert identities["landlock"] == identities["full"] | {"code.level": "landlock"}
    assert "code.level" not in identities["full"]


def test_verdicts_of_another_level_are_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CodeGrader, "rule", lambda self, gold, answer: ("correct", "scripted"))
    prompt = Prompt.from_question("Print one.", '{"test_cases": [{"type": "stdin_stdout", "output": "1"}]}', "code")
    text = "<think>a</think>```python\nprint(1)\n```"
    traces = [make_trace(text, prompt=prompt)]
    source = {"kind": "file", "path": "tasks.jsonl", "task": "code", "extract": "tests"}
    settings: dict[str, Any] = {"correct": {"sandbox": "process"}, "prompts": [source]}
    at_level(monkeypatch, "process")
    run_filter(tmp_path / "run", traces, **settings)
    first = judged_by(tmp_path / "run")
    at_level(monkeypatch, "full")
    run_filter(tmp_path / "run", **settings)
    assert len(first) == len(judged_by(tmp_path / "run")) == 1 and first != judged_by(tmp_path / "run")


# ---- decontamination


PEARS = "Ann picks 17 pears and 25 plums. How many fruits has she?"
TRAINS = "A train goes 80 miles in 2 hours. How fast is it?"


def problems(path: Path, *questions: str) -> None:
    path.write_text("".join(json.dumps({"question": each, "answer": "42"}) + "\n" for each in questions))


def asked(*questions: str) -> list[Any]:
    return [make_trace(question=each) for each in questions]


def test_another_content_of_a_benchmark_is_refused(tmp_path: Path) -> None:
    """A file by its name, a card's file, and a file in place of a card's source: also of a finished stage."""
    bench, other, run = tmp_path / "bench.jsonl", tmp_path / "other.jsonl", tmp_path / "run"
    problems(bench, PEARS)
    problems(other, PEARS, TRAINS)
    settings: dict[str, Any] = {"decontaminate": {"benchmarks": [str(bench)]}}
    assert run_filter(run, asked(PEARS, TRAINS, "What is 1 + 1?"), **settings).kept == 2
    assert run_filter(run, **settings).kept == 2
    bench.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"decontaminate\.content\..*bench\.jsonl: .* → .*--fresh filter"):
        run_filter(run, **settings)
    assert run_filter(run, fresh=True, **settings).kept == 1


@pytest.mark.parametrize("place", ["the card", "eval.sources"])
def test_the_file_of_a_card_is_part_of_the_settings(place: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    problems(first, PEARS)
    problems(second, PEARS, TRAINS)
    card = tmp_path / "fruit.yaml"

    def identity(path: Path) -> object:
        card.write_text(f"name: fruit\nprompts: {{kind: file, path: {path if place == 'the card' else first}}}\n")
        sources = {} if place == "the card" else {"fruit": str(path)}
        recipe = make_recipe(decontaminate=True)
        evaluation = recipe.eval.model_copy(update={"benchmarks": (str(card),), "sources": sources})
        with Run(tmp_path / "run", recipe.model_copy(update={"eval": evaluation})) as run:
            settings = STAGE.settings(run)
        return {key: value for key, value in settings.items() if key.startswith("decontaminate.content.")}

    before = identity(first)
    assert before and before == identity(first) and before != identity(second)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(first.read_bytes())
    assert identity(copy) == before, "a file may move"


def test_traces_are_judged_against_one_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a dataset changes under one name, such as one of the hub without a revision, all traces are judged anew
    when there is work left, so that no output mixes two contents."""
    bench, run = tmp_path / "bench.jsonl", tmp_path / "run"
    problems(bench, PEARS)
    monkeypatch.setattr("distill.filters.resources._hash_of", lambda path: "unknown")
    settings: dict[str, Any] = {"decontaminate": {"benchmarks": [str(bench)]}}
    assert run_filter(run, asked(TRAINS, "What is 1 + 1?"), **settings).kept == 2
    problems(bench, PEARS, TRAINS)
    assert run_filter(run, asked(PEARS), **settings).kept == 1


def test_fresh_moves_nothing_where_the_filter_is_refused(tmp_path: Path) -> None:
    """A benchmark that cannot be read is found before the output of a finished filter is moved aside."""
    run, file = tmp_path / "run", tmp_path / "traces.jsonl"
    file.write_text(json.dumps({"q": "1 + 1?", "r": "One and one.", "a": "\\boxed{2}", "g": "2"}) + "\n")
    source = {"kind": "file", "path": str(file), "question": "q", "reasoning": "r", "response": "a", "answer": "g"}
    sets = [f"traces=[{json.dumps(source)}]", "prompts=[]", "filter.decontaminate=null", "filter.length=false"]
    run_recipe(catalog.load_recipe("tiny", sets), run, ["generate", "filter"])
    missing = catalog.load_recipe("tiny", [*sets, f"filter.decontaminate={{benchmarks: [{tmp_path / 'gone.jsonl'}]}}"])
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        run_recipe(missing, run, ["filter"], fresh=["filter"])
    assert (run / "stages" / "filter.json").exists() and not (run / "old").exists()
