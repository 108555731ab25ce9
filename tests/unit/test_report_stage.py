"""The report as a stage: written when it is missing, damaged or older than what it shows, whatever is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the processes that run this file
from report_support import finish, make_run

from distill import lock, report
from distill.artefacts import GenerateSummary, RunPaths
from distill.config import parse, read_yaml
from distill.errors import UserError
from distill.recipe import Recipe
from distill.record import StageRecord
from distill.report import Report, write_report
from distill.run import Run

FILES = ("report.html", *(f"report/{name}.{kind}" for name in ("funnel", "lengths", "loss") for kind in ("png", "svg")))


def opened(directory: Path) -> Run:
    recipe = RunPaths(directory).recipe
    return Run(directory, parse(Recipe, read_yaml(recipe), str(recipe)))


def perform(directory: Path) -> bool:
    """Perform the stage as `distill run` does; whether it had something to do."""
    with opened(directory) as run:
        Report().perform(run)
        return "report" in run.worked


def content(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = make_run(tmp_path_factory.mktemp("stage") / "run", "train", traces=20)
    assert perform(directory) and not perform(directory)
    return directory


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_written_again(finished, name):
    before = content(finished)
    (finished / name).unlink()
    assert perform(finished) and content(finished) == before and not perform(finished)


def test_a_damaged_page_is_written_again(finished):
    before = content(finished)
    (finished / "report.html").write_bytes(before["report.html"][:1000])
    assert perform(finished) and content(finished) == before


def test_it_is_written_again_when_what_it_shows_is_newer(finished):
    before = content(finished)
    record = StageRecord.read(RunPaths(finished).record("generate"), "")
    summary = GenerateSummary.model_validate(record.summary).model_copy(update={"completion_tokens": 12_345})
    finish(finished, "generate", summary)
    assert perform(finished) and b"12,345 tokens in total" in (finished / "report.html").read_bytes()
    finish(finished, "generate", GenerateSummary.model_validate(record.summary))
    assert perform(finished) and content(finished) == before


@pytest.mark.slow
def test_distill_report_is_no_damage(finished):
    """It is recorded, with its price: the next run writes it again because the price differs, and says nothing."""
    before, aside = content(finished), list((finished / "old").rglob("*"))
    write_report(finished)
    assert content(finished) == before and not perform(finished)
    write_report(finished, 2.5)
    assert content(finished) != before
    assert perform(finished) and content(finished) == before and list((finished / "old").rglob("*")) == aside


def test_it_shows_the_recipe_of_the_run_that_writes_it(tmp_path):
    """Not that of an earlier one, which recipe.yaml has until the stage begins."""
    directory = make_run(tmp_path / "run", "generate", traces=20)
    with opened(directory) as run:
        run.recipe = run.recipe.model_copy(update={"price_per_hour": 3.6, "description": "another one"})
        Report().perform(run)
        assert Report().is_finished(run)
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "at 3.60 per hour" in page and "price_per_hour: 3.6" in page and "another one" in page


def test_a_page_that_was_written_beside_a_run_is_no_damage(tmp_path, capsys):
    directory = make_run(tmp_path / "run", "generate", traces=20)
    assert perform(directory)
    before = (directory / "report.html").read_bytes()
    (directory / "report.html").write_bytes(b"by another process")
    assert perform(directory) and (directory / "report.html").read_bytes() == before
    assert not (directory / "old").exists() and "damaged" not in capsys.readouterr().out


def test_a_damaged_record_of_it_is_in_no_others_way(tmp_path):
    directory = make_run(tmp_path / "run", "generate", traces=20)
    assert perform(directory)
    record = RunPaths(directory).record("report")
    record.write_text("{")
    with opened(directory) as run:
        run.refuse_other_settings("report", Report().recipe_settings(run.recipe))
    with pytest.raises(UserError, match=r"report\.json is damaged; delete it; `distill report .*` writes it again"):
        write_report(directory)
    record.unlink()
    write_report(directory)
    assert not perform(directory)


def test_a_run_that_is_under_way_can_be_looked_at(finished, capsys):
    before = content(finished)
    process = subprocess.Popen([sys.executable, __file__, "hold", str(finished)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert lock.is_held(finished)
        write_report(finished)
    finally:
        process.kill()
        process.wait()
    assert "another process works in" in capsys.readouterr().out and content(finished) == before
    assert not lock.is_held(finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    "writes",
    [0, *(pytest.param(writes, marks=pytest.mark.slow) for writes in range(1, len(FILES) - 1)), len(FILES) - 1],
)
def test_a_kill_while_it_is_written_changes_nothing(tmp_path, finished, writes):
    """Killed at each of its files, before that file has its name: the rerun gives the same bytes."""
    directory = make_run(tmp_path / "run", "train", traces=20)
    command = [sys.executable, __file__, "kill", str(directory), str(writes)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert sum((directory / name).exists() for name in FILES) == writes
    assert perform(directory) and content(directory) == content(finished) and not perform(directory)
    assert not [path for path in directory.rglob("*.tmp")]


@pytest.mark.parametrize("name", ["filtered/kept/part-00000.parquet", "checkpoints/log.jsonl"])
def test_it_shows_no_damaged_file(tmp_path, name):
    directory = make_run(tmp_path / "run", "train", traces=20)
    path = directory / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    stage = "filter" if name.startswith("filtered") else "train"
    fix = f"`distill {stage} {directory}/recipe.yaml --run-dir {directory} --verify` recreates it"
    with pytest.raises(UserError, match="has changed") as error:
        write_report(directory)
    assert str(path) in str(error.value) and fix in str(error.value)
    assert not (directory / "report.html").exists()


def test_it_shows_no_damaged_evaluation(tmp_path):
    directory = make_run(tmp_path / "run", traces=20, problems=10)
    grades = directory / "eval/tiny-arithmetic/student/grades.jsonl"
    grades.write_bytes(b"".join(grades.read_bytes().splitlines(keepends=True)[:5]))
    with pytest.raises(UserError, match=r"student/grades\.jsonl has .* bytes instead of .*`distill eval .* --verify`"):
        write_report(directory)


def main(what: str, directory: Path, writes: int = 0) -> None:
    """In a process of its own: hold the lock, or write the report and be killed at one of its files."""
    if what == "hold":
        with opened(directory):
            print("held", flush=True)
            signal.pause()
    write, count = report.write_whole, 0

    def killed(path: Path, data: bytes | str) -> None:
        nonlocal count
        if count == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        write(path, data)

    report.write_whole = killed
    perform(directory)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
