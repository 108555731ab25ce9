"""`distill recipes check` and its like: notes and errors as they are printed."""

import json
import sys

import pytest

from distill import catalog, cli


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """`checked(rows)` → (exit code, output, errors) of checking a recipe with these prompts."""

    def check(*rows):
        prompts, recipe = tmp_path / "prompts.jsonl", tmp_path / "mine.yaml"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = json.dumps([{"kind": "file", "path": str(prompts)}])
        recipe.write_text(catalog.load_recipe("tiny", [f"prompts={source}"]).to_yaml())
        monkeypatch.setattr(sys, "argv", ["distill", "recipes", "check", str(recipe)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        streams = capsys.readouterr()
        return end.value.code, streams.out, streams.err

    return check


def test_gold_answers_that_no_grader_reads_are_counted(checked):
    rows = [
        {"question": f"q{i}", "answer": gold} for i, gold in enumerate(["5", "x \\mid y", "90°", "it depends on it"])
    ]
    code, out, err = checked(*rows)
    assert (code, err) == (0, "")
    assert "mine.yaml: ok\n  note: 2 of 4 gold answers cannot be read by a grader, such as 'x \\\\mid y'" in out


def test_a_file_without_trouble_has_no_note(checked):
    code, out, err = checked({"question": "q", "answer": "5"})
    assert (code, err) == (0, "") and out.endswith("mine.yaml: ok\n")


def test_a_mistake_is_one_line_and_the_exit_code(checked):
    code, out, err = checked({"problem": "q", "answer": "5"})
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert "no column question; the columns are problem, answer" in err


def test_prompts_that_the_filter_cannot_grade_are_refused_before_they_are_asked(tmp_path, monkeypatch, capsys):
    source = json.dumps([{"kind": "file", "path": str(tmp_path / "a.jsonl"), "answer": None}])
    (tmp_path / "a.jsonl").write_text('{"question": "q"}\n')
    (tmp_path / "mine.yaml").write_text(catalog.load_recipe("tiny", [f"prompts={source}"]).to_yaml())
    monkeypatch.setattr(sys, "argv", ["distill", "recipes", "check", str(tmp_path / "mine.yaml")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert "prompts.0 has no gold answers" in error and "set filter.correct to false" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "filter.decontaminate.benchmarks=[aime-2042]",
            "filter.decontaminate.benchmarks: no benchmark is named 'aime-2042'",
        ),
        ("filter.decontaminate.benchmarks=[gone.jsonl.gz]", "filter.decontaminate.benchmarks: no file gone.jsonl.gz"),
        ("eval.sources={math: gone.jsonl}", "eval.sources names math, which is not evaluated"),
        ("eval.published=nobody", "eval.published: no benchmark card has scores of nobody"),
        ("train.chat_template=gone.jinja", "no chat template 'gone.jinja'"),
        ("judge={teacher: deepseek-r2}", "judge.teacher: no teacher is named 'deepseek-r2'"),
    ],
)
def test_every_name_in_a_recipe_is_checked(tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(catalog.load_recipe("tiny", [change]).to_yaml())
    monkeypatch.setattr(sys, "argv", ["distill", "recipes", "check", "mine.yaml"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and message in error


def test_a_run_that_is_not_there_yet_is_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = catalog.load_recipe("tiny", ["train.data=[{kind: kept}, {kind: run, path: runs/later}]"])
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    monkeypatch.setattr(sys, "argv", ["distill", "recipes", "check", "mine.yaml"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert "note: there is no run runs/later yet, whose traces are read" in capsys.readouterr().out


def test_a_benchmark_that_no_grader_can_score_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    for task in ("chat", "math"):
        card = {"name": "talk", "prompts": {"kind": "file", "path": str(tmp_path / "a.jsonl"), "task": task}}
        (tmp_path / f"{task}.yaml").write_text(json.dumps(card))
    monkeypatch.setattr(
        sys, "argv", ["distill", "benchmarks", "check", *(str(tmp_path / f"{t}.yaml") for t in ("chat", "math"))]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    streams = capsys.readouterr()
    assert end.value.code == 2 and streams.err.count("\n") == 1
    assert "chat.yaml: task 'chat' has no grader; set `task` to one of math, choice, code" in streams.err
    assert "math.yaml: ok" in streams.out
