"""Files of `distill eval --model … --out DIR` that are damaged: the same command recreates them, and says so."""

import json
import shutil
from functools import partial

import pytest
from eval_support import distill, right, scores, server, shared_sums, sums, url

from distill import __version__
from distill.artefacts import CHECKSUM, _checksum
from distill.evaluations import EvaluationPaths, EvaluationRecord, read_results
from distill.grading.math import MathGrader
from distill.integrity import record_files
from distill.traces.ledger import Ledger

__all__ = ["shared_sums", "sums"]


def score(card, out, reply=right, *more):
    """`distill eval --model` on a server; returns the number of requests."""
    with server(reply) as script, pytest.MonkeyPatch.context() as monkeypatch:
        asked = ["eval", "--model", url(script), "--benchmark", card, "--out", out]
        assert distill(monkeypatch, *asked, *more) == 0
        return len(script.asked)


@pytest.fixture
def command(shared_sums, tmp_path):
    """Scores in `tmp_path / "out"`."""
    return partial(score, shared_sums, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(shared_sums, tmp_path_factory):
    """A finished evaluation, to copy."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert score(shared_sums, out) == 16
    return out


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", "{"),
        ("settings.json", None),
        ("grading.json", "{"),
        ("grading.json", None),
        ("grades.jsonl", "{}\n"),
        ("grades.jsonl", None),
        ("votes.jsonl", "[]\n"),
        ("scores.json", "[]"),
        ("scores.json", '{"pass@1": "abc"}'),
        ("record.json", "{}"),
    ],
)
def test_a_damaged_file_is_made_again(name, content, finished, command, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    first, path = scores(tmp_path / "out"), tmp_path / "out" / "sums" / "scripted" / name
    path.unlink() if content is None else path.write_text(content)
    capsys.readouterr()
    assert command() == 0, "no sample is drawn again"
    assert scores(tmp_path / "out") == first
    assert name in capsys.readouterr().out
    assert (path.parent / "damaged-1" / name).exists() is (content is not None), "what was damaged is kept aside"


def test_half_of_the_grades_are_made_again(command, tmp_path, capsys):
    command()
    grades = EvaluationPaths(tmp_path / "out" / "sums" / "scripted").grades
    grades.write_bytes(b"".join(grades.read_bytes().splitlines(keepends=True)[:8]))
    capsys.readouterr()
    assert command() == 0
    assert "grades.jsonl has" in capsys.readouterr().out and scores(tmp_path / "out").samples == 16


def test_a_sample_that_is_graded_twice_is_not_counted_twice(command, tmp_path):
    """An unfinished evaluation has no record; the ledger itself must hold every sample once."""
    command()
    paths = EvaluationPaths(tmp_path / "out" / "sums" / "scripted")
    paths.record.unlink()
    first = next(iter(Ledger(paths.grades).rows()))
    with Ledger(paths.grades) as ledger:
        ledger.append([first])
    assert command() == 0 and len(paths.grades.read_text().splitlines()) == 16


def test_damaged_samples_are_drawn_again(command, tmp_path):
    """Only they are, and only they are graded anew: the server answers differently the second time."""
    command(right, "--limit", 4)
    command(right)
    paths = EvaluationPaths(tmp_path / "out" / "sums" / "scripted")
    part = sorted(paths.traces.glob("*.parquet"))[-1]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert command(lambda question, seed: ("\\boxed{-1}", "stop")) == 8
    assert scores(tmp_path / "out").pass_at_1.value == 0.5
    assert read_results(paths.root).scores.correct == 8


def test_a_benchmark_with_answers_that_no_grader_reads_says_so(sums, tmp_path, capsys):
    rows = [
        {"question": f"What is {n} + {n}?", "answer": "it depends on the weather" if n == 3 else str(2 * n)}
        for n in range(8)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score(sums, tmp_path / "out")
    assert (
        "1 of 8 gold answers cannot be read by a grader, such as 'it depends on the weather'" in capsys.readouterr().out
    )


@pytest.fixture
def other_grader(monkeypatch):
    """Makes the grader of mathematics another version, which gives every answer one verdict."""

    def change(version, verdict=None):
        monkeypatch.setattr(MathGrader, "version", version)
        if verdict is not None:
            monkeypatch.setattr(MathGrader, "rule", lambda self, gold, answer: (verdict, "scripted"))

    return change


def test_grades_of_another_version_of_the_grader_are_made_again(command, tmp_path, capsys, monkeypatch, other_grader):
    """A finished evaluation and an extended one are both graded again, so one grader gives all grades of a score."""
    with monkeypatch.context() as earlier:
        earlier.setattr(MathGrader, "version", 0)
        earlier.setattr(MathGrader, "rule", lambda self, gold, answer: ("wrong", "scripted"))
        earlier.setattr("distill.eval.grading.__version__", "0.0.1")
        assert command(right, "--samples", 2) == 16
    first = scores(tmp_path / "out")
    assert (first.pass_at_1.value, first.grading["math.version"], first.versions["distill"]) == (0, 0, "0.0.1")
    assert command(right, "--samples", 4) == 16, "only the new samples are drawn"
    second = scores(tmp_path / "out")
    assert (second.pass_at_1.value, second.samples, second.versions["distill"]) == (1, 32, __version__)
    assert second.grading["math.version"] == MathGrader.version and second.grading["math.sympy"]
    assert f"its grades are of another grader (math.version: 0 → {MathGrader.version})" in capsys.readouterr().out
    other_grader(MathGrader.version + 1, "wrong")
    assert command(right, "--samples", 4) == 0
    assert scores(tmp_path / "out").pass_at_1.value == 0


def test_versions_are_those_that_made_the_samples_and_the_grades(command, tmp_path, monkeypatch):
    """Another version of distill with the same grader changes nothing, and does not sign for what it did not do."""
    with monkeypatch.context() as earlier:
        earlier.setattr("distill.eval.grading.__version__", "0.0.1")
        command(right, "--samples", 2)
    monkeypatch.setattr("distill.eval.evaluation.version", lambda name: "9.9")
    command(right, "--samples", 2)
    versions = scores(tmp_path / "out").versions
    assert versions["distill"] == "0.0.1" and versions["torch"] != "9.9"
    command(right, "--samples", 3)
    assert scores(tmp_path / "out").versions["torch"] == f"{versions['torch']}, 9.9"


def test_grades_without_a_version_are_made_again(command, tmp_path, capsys):
    """As earlier versions of distill left them: the files are read, their grades are not used."""
    command()
    paths = EvaluationPaths(tmp_path / "out" / "sums" / "scripted")
    paths.grading.unlink()
    rows = [row | {"verdict": "wrong"} for row in Ledger(paths.grades).rows()]
    paths.grades.unlink()
    with Ledger(paths.grades) as ledger:
        ledger.append(rows)
    for path, field in ((paths.settings, "versions"), (paths.scores, "grading")):
        content = json.loads(path.read_text())
        del content[field], content[CHECKSUM]
        path.write_text(json.dumps(content | {CHECKSUM: _checksum(content)}))
    record = EvaluationRecord.read(paths.record, "")
    files = record_files(paths.root, paths.products())
    record.model_copy(update={"files": files}).write(paths.record)
    assert read_results(paths.root).scores.grading == {}
    assert command() == 0 and scores(tmp_path / "out").pass_at_1.value == 1
    assert "another grader (their version is not recorded)" in capsys.readouterr().out
