"""Products of a stage: what is missing or damaged is named, moved aside and made again; records are checked."""

import json
import os
import random
from pathlib import Path

import pytest
from run_support import (
    FILTER,
    GENERATE,
    OUTPUTS,
    STAGES,
    Writing,
    begin,
    content,
    finished,
    finished_run,
    perform,
    recipe,
)

from distill.errors import UserError
from distill.record import read_recipe
from distill.run import Run


@pytest.fixture
def done(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "run")


def redo(directory: Path, verify: bool = False) -> set[str]:
    """The stages that work when the run is repeated."""
    with Run(directory, recipe(), verify) as run:
        perform(run)
        return run.worked


def flip(path: Path, keep_time: bool = True) -> None:
    before = path.stat()
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("stage", OUTPUTS)
@pytest.mark.parametrize("damage", ["missing", "shorter", "changed", "foreign"])
def test_damaged_products_are_named_moved_aside_and_made_again(
    done: Path, stage: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(done)
    name = f"{OUTPUTS[stage][-1]}/file"
    expected = {
        "missing": f"{stage}: {done / name} is missing; regenerating it",
        "shorter": f"{stage}: {done / name} has 1 bytes instead of {len(stage) + 2}; regenerating it",
        "changed": f"{stage}: {done / name} has changed between bytes 0 and {len(stage) + 2}; regenerating it",
        "foreign": f"{stage}: {done / OUTPUTS[stage][-1]}/other was not written by this run; regenerating it",
    }
    match damage:
        case "missing":
            (done / name).unlink()
        case "shorter":
            (done / name).write_text("x")
        case "changed":
            flip(done / name, keep_time=False)
        case "foreign":
            (done / OUTPUTS[stage][-1] / "other").write_text("x")
    assert redo(done) == {stage}
    assert expected[damage] in capsys.readouterr().out.replace("\n", " ")
    after = {key: value for key, value in content(done).items() if not key.startswith(("old/", "stages/"))}
    assert after == {key: value for key, value in before.items() if not key.startswith("stages/")}
    assert redo(done) == set()


def test_a_copied_run_is_finished(done: Path) -> None:
    for path in done.rglob("*"):
        os.utime(path, ns=(1, 1))
    assert redo(done) == set()


def test_a_change_that_keeps_size_and_time_is_found_by_verify_and_when_it_is_read(done: Path) -> None:
    flip(done / "filtered" / "file")
    assert redo(done) == set(), "the quick look compares names, sizes and times"
    with Run(done, recipe()) as run, pytest.raises(UserError, match="filtered/file has changed .* --verify"):
        run.check_inputs([FILTER])
    assert redo(done, verify=True) == {"filter"}
    with Run(done, recipe()) as run:
        run.check_inputs(STAGES)


def test_damaged_products_are_made_again_when_more_is_asked_for(done: Path) -> None:
    flip(done / "traces" / "file", keep_time=False)
    more = Writing("generate", "traces", samples=2)
    with Run(done, recipe()) as run:
        assert run.has_work_left(more, {"samples": 2}) and not run.has_work_left(GENERATE, {"samples": 1})
        more.perform(run)
    assert (done / "old" / "damaged-1" / "traces" / "file").is_file()
    assert (done / "traces" / "file").read_text() == "generate 2"


def test_what_only_the_whole_stage_would_write_again_is_refused(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (done / "traces" / "file").unlink()
    monkeypatch.setattr(GENERATE, "irreplaceable", ("traces/*",), raising=False)
    with pytest.raises(UserError, match=r"traces/file is missing, and only .*put the file back.*--fresh generate"):
        redo(done)
    assert not (done / "old").exists()
    (done / "traces" / "file").write_text("generate 1")
    assert redo(done) == set()


def test_making_damaged_products_again_can_be_interrupted(done: Path) -> None:
    flip(done / "traces" / "file", keep_time=False)
    with Run(done, recipe()) as run:
        assert finished(run, GENERATE) is None
        run.set_damage_aside(GENERATE)
    with Run(done, recipe()) as run:
        assert not run.is_finished("generate")
        assert not run.has_work_left(GENERATE, {"samples": 1})
        begin(run, GENERATE)
    with Run(done, recipe()) as run:
        assert not run.has_work_left(GENERATE, {"samples": 1}), "repairing is remembered by the record"
        GENERATE.perform(run)
        assert run.is_finished("generate")
    assert redo(done) == set()


def test_one_flipped_bit_of_any_record_is_refused(done: Path) -> None:
    rng = random.Random(0)
    for path in (done / "run.json", *sorted((done / "stages").glob("*.json"))):
        whole = path.read_bytes()
        for _ in range(40):
            bit = rng.randrange(8 * len(whole))
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            if json_equal(bytes(changed), whole):
                continue  # white space
            with pytest.raises(UserError) as refusal:
                redo(done)
            assert path.name in str(refusal.value) or "version of distill" in str(refusal.value)
        path.write_bytes(whole)
    assert redo(done) == set()


def json_equal(one: bytes, two: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(two))
    except ValueError:
        return False


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, '{"sha256": 1}', "\xff"])
def test_a_damaged_record_is_one_line_and_fresh_is_the_way_out(done: Path, text: str) -> None:
    (done / "stages" / "filter.json").write_text(text)
    with pytest.raises(UserError, match="filter.json is damaged; --fresh filter"):
        redo(done)
    with Run(done, recipe()) as run:
        run.fresh(STAGES[1:])
        assert not (done / "filtered").exists()
        perform(run)
        assert run.worked == {"filter", "train", "eval"}


@pytest.mark.parametrize("name, text", [("run.json", None), ("recipe.yaml", None), ("recipe.yaml", "name: other")])
def test_identity_and_recipe_are_written_again(
    done: Path, name: str, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done / "recipe.yaml").read_bytes()
    (done / name).unlink()
    if text is not None:
        (done / name).write_text(text)
    with Run(done, recipe()) as run:
        run.restore_identity()
        run.restore_identity()
    assert capsys.readouterr().out.replace("\n", " ").count("was missing or changed; rewriting it") == 1
    assert (done / "recipe.yaml").read_bytes() == before and read_recipe(done) == before.decode()
    assert redo(done) == set()
