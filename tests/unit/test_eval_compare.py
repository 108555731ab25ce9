"""`distill eval compare`: what it prints, what it refuses, what it must not count."""

import json
import shutil

import pytest
from eval_support import distill, right, server, shared_sums, url

from distill.artefacts import Comparison, Interval
from distill.eval.compare import show
from distill.evaluations import EvaluationPaths
from distill.traces.ledger import Ledger

__all__ = ["shared_sums"]


@pytest.fixture(scope="module")
def evaluated(shared_sums, tmp_path_factory):
    """Two evaluations: `a` is always right, `b` on six of eight problems."""
    directory = tmp_path_factory.mktemp("evaluated")
    replies = {"a": right, "b": lambda q, seed: right(q, seed) if int(q.split()[2]) < 6 else ("no", "stop")}
    for name, reply in replies.items():
        with server(reply) as script:
            asked = ["eval", "--model", url(script), "--benchmark", shared_sums, "--out", directory / name]
            with pytest.MonkeyPatch.context() as monkeypatch:
                assert distill(monkeypatch, *asked) == 0
    return directory


@pytest.fixture
def two(evaluated, tmp_path):
    """A copy of the two."""
    shutil.copytree(evaluated, tmp_path, dirs_exist_ok=True)
    return tmp_path / "a", tmp_path / "b"


def test_two_evaluations_are_compared(two, tmp_path, monkeypatch, capsys):
    file = tmp_path / "comparison.json"
    assert distill(monkeypatch, "eval", "compare", *two, "--json", file) == 0
    printed = capsys.readouterr().out
    (row,) = json.loads(file.read_text())
    assert row["difference"]["value"] == 0.25 and len(row["gained"]) == 2 and row["lost"] == []
    assert "What is 7 + 7?" in printed and "+25.0" in printed and "note:" not in printed


def test_control_characters_of_a_question_are_written_out(capsys):
    """A file with them is refused, samples that somebody else stored may have them."""
    half = Interval(value=0.5, low=0.0, high=1.0)
    row = Comparison(
        benchmark="b",
        models=("a", "b"),
        problems=1,
        first=1.0,
        second=0.5,
        difference=half,
        gained=("x",),
        lost=(),
        p=1.0,
    )
    show([row], {"x": "What is 1?\x1b[31m\x07"})
    printed = capsys.readouterr().out
    assert "What is 1?\\x1b[31m\\x07" in printed and "\x1b" not in printed and "\x07" not in printed


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("name", ["grades.jsonl", "scores.json", "record.json"])
def test_what_is_not_whole_is_not_compared(two, name, share, monkeypatch, capsys):
    path = two[1] / "sums" / "scripted" / name
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: int(share * len(lines))]))
    assert distill(monkeypatch, "eval", "compare", *two) == 2
    error = capsys.readouterr().err
    assert f"{path} " in error and error.count("\n") == 1
    assert f"the `distill eval --model` command with --out {two[1]} recreates it" in error


def test_directories_may_be_relative(two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(two[0])
    assert distill(monkeypatch, "eval", "compare", ".", "../b") == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    shutil.move(two[0], tmp_path / "run" / "eval")
    (tmp_path / "run" / "eval" / "sums" / "scripted" / "scores.json").write_text("")
    remedies = {
        (".", "."): "`distill eval recipe.yaml --run-dir . --verify` recreates it",
        ("eval", "."): "`distill eval ../recipe.yaml --run-dir .. --verify` recreates it",
        ("eval/sums", ".."): "`distill eval ../../recipe.yaml --run-dir ../.. --verify` recreates it",
        ("..", "run"): "`distill eval run/recipe.yaml --run-dir run --verify` recreates it",
    }
    for (place, directory), remedy in remedies.items():
        monkeypatch.chdir(tmp_path / "run" / place)
        capsys.readouterr()
        assert distill(monkeypatch, "eval", "compare", directory, two[1]) == 2
        assert remedy in capsys.readouterr().err


def test_a_changed_verdict_is_noticed(two, monkeypatch, capsys):
    """The row is written as an evaluation writes it, with its checksum: only the record shows the change."""
    path = two[1] / "sums" / "scripted" / "grades.jsonl"
    rows = list(Ledger(path).rows())
    path.unlink()
    with Ledger(path) as ledger:
        ledger.append([row | {"verdict": "correct"} for row in rows])
    assert distill(monkeypatch, "eval", "compare", *two) == 2
    assert "grades.jsonl has" in capsys.readouterr().err


def test_only_what_scores_count_is_compared(two, shared_sums, tmp_path, monkeypatch, capsys):
    """Fewer samples and problems are asked for later: the grades of the others stay, and are not counted."""
    with server(right) as script:
        asked = [
            "eval",
            "--model",
            url(script),
            "--benchmark",
            shared_sums,
            "--out",
            two[0],
            "--limit",
            3,
            "--samples",
            1,
        ]
        assert distill(monkeypatch, *asked) == 0 and script.asked == []
    assert len(EvaluationPaths(two[0] / "sums/scripted").grades.read_text().splitlines()) == 16
    file = tmp_path / "comparison.json"
    capsys.readouterr()
    assert distill(monkeypatch, "eval", "compare", *two, "--json", file) == 0
    (row,) = json.loads(file.read_text())
    assert row["problems"] == 3 and row["left_out"] == 5 and row["difference"]["value"] == 0
    assert row["differing"] == ["samples per problem: 1, 2"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "the two differ in more than the model: samples per problem: 1, 2" in printed
    assert "5 problems that only one of the two has are left out; a question with another gold answer" in printed


def test_other_settings_are_named(two, shared_sums, tmp_path, monkeypatch, capsys):
    with server(right) as script:
        asked = [
            "eval",
            "--model",
            url(script),
            "--benchmark",
            shared_sums,
            "--out",
            tmp_path / "c",
            "--max-new-tokens",
            99,
        ]
        assert distill(monkeypatch, *asked) == 0
    capsys.readouterr()
    assert distill(monkeypatch, "eval", "compare", two[0], tmp_path / "c") == 0
    assert "sampling.max_new_tokens: 32768, 99" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A", "nowhere"], "nowhere: no such directory"),
        (["A", "EMPTY"], "has no finished evaluation; `distill eval` makes one"),
        (["A", "B", "--json", "EMPTY"], "a directory; name a file in it"),
        (["A", "B", "--json", "nodir/x.json"], "error: --json nodir/x.json: no such directory; create nodir first"),
        (["A", "B", "--models", "x"], "give two names separated by a comma"),
        (["A", "B", "--models", "scripted,other"], "has no model other; --models can name scripted"),
    ],
)
def test_wrong_input_is_one_line(two, arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    places = {"A": two[0], "B": two[1], "EMPTY": tmp_path / "empty"}
    assert distill(monkeypatch, "eval", "compare", *(places.get(name, name) for name in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_directory_with_several_models_wants_one_named(two, monkeypatch, capsys):
    (two[0] / "sums" / "scripted").rename(two[0] / "sums" / "first")
    (two[1] / "sums" / "scripted").rename(two[0] / "sums" / "second")
    assert distill(monkeypatch, "eval", "compare", two[0], two[0]) == 2
    assert "has several models on sums: choose one of first, second with --models" in capsys.readouterr().err
    assert distill(monkeypatch, "eval", "compare", two[0], two[0], "--models", "first,second") == 0
