"""Commands parse and call; errors become exit codes. What the commands call is tested elsewhere, and replaced here."""

import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from distill import __version__, catalog, cli, interrupts
from distill.errors import UserError, WorkError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def distill(monkeypatch, capsys, tmp_path):
    """`distill("run", "tiny")` → (exit code, stdout, stderr), from an empty directory."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["distill", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def pipeline(monkeypatch):
    """Stands in for `distill.pipeline`: records what it is asked to do, and raises `failure` if there is one."""
    stand_in = types.ModuleType("distill.pipeline")
    stand_in.calls, stand_in.failure = [], None

    def run_recipe(recipe, directory, stages=None, fresh=(), verify=False, on="local"):
        stand_in.calls.append((recipe, directory, stages, list(fresh)))
        if stand_in.failure:
            raise stand_in.failure

    stand_in.run_recipe = run_recipe
    stand_in.default_run_dir = lambda recipe: Path("runs") / recipe.name
    monkeypatch.setitem(sys.modules, "distill.pipeline", stand_in)
    return stand_in


# ---- the stages


@pytest.mark.parametrize(
    ("command", "stages"),
    [("run", None), ("generate", ["generate"]), ("filter", ["filter"]), ("train", ["train"]), ("eval", ["eval"])],
)
def test_a_stage_command_runs_its_stage(distill, pipeline, command, stages):
    assert distill(command, "tiny") == (0, "", "")
    assert pipeline.calls == [(catalog.load_recipe("tiny"), Path("runs/tiny"), stages, [])]


def test_options_reach_the_pipeline(distill, pipeline):
    options = ["--set", "seed=3", "--set", "train.seed=4", "--run-dir", "here", "--fresh", "train", "--fresh", "eval"]
    assert distill("run", "tiny", *options)[0] == 0
    recipe, directory, _, fresh = pipeline.calls[0]
    assert (recipe.seed, recipe.train.seed, directory, fresh) == (3, 4, Path("here"), ["train", "eval"])


def test_report_needs_a_run_directory(distill, tmp_path):
    code, _, err = distill("report", str(tmp_path))
    assert code == 2
    assert err == f"error: {tmp_path} is not a run directory (no recipe.yaml in it); `distill run RECIPE` makes one\n"


def test_report_prints_where_the_page_is(distill, tmp_path, monkeypatch):
    stand_in = types.ModuleType("distill.report")
    prices = []
    stand_in.write_report = lambda directory, price: prices.append(price) or directory / "report.html"
    monkeypatch.setitem(sys.modules, "distill.report", stand_in)
    (tmp_path / "recipe.yaml").touch()
    assert distill("report", str(tmp_path)) == (0, f"{tmp_path / 'report.html'}\n", "")
    assert distill("report", str(tmp_path), "--price-per-hour", "2.5")[0] == 0 and prices == [None, 2.5]
    assert distill("report", str(tmp_path), "--price-per-hour", "-1")[0] == 2


# ---- exit codes


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (UserError("a key\n  is wrong"), 2, "error: a key is wrong"),
        (WorkError("a worker died; rerun"), 1, "error: a worker died; rerun"),
        (KeyboardInterrupt(), 130, "error: interrupted; rerun the same command to resume"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/some/file"),
            2,
            "error: /some/file: Permission denied; change its permissions (chmod), or name another place",
        ),
        (OSError(errno.EROFS, "Read-only file system"), 2, "error: runs/tiny: Read-only file system"),
    ],
)
def test_failures_are_one_line_and_an_exit_code(distill, pipeline, failure, code, line):
    pipeline.failure = failure
    assert distill("run", "tiny") == (code, "", line + "\n")


def test_only_commands_that_resume_say_so(distill, pipeline, monkeypatch):
    monkeypatch.setattr(interrupts, "_resumable", False)
    export = types.SimpleNamespace(file_type_of=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with monkeypatch.context() as patch:
        patch.setattr("distill.traces.exports.file_type_of", export.file_type_of)
        assert distill("export", "runs/tiny", "--out", "a.jsonl") == (130, "", "error: interrupted\n")
    pipeline.failure = KeyboardInterrupt()
    assert distill("run", "tiny")[2] == "error: interrupted; rerun the same command to resume\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_the_works_failure_and_says_how_to_go_on(distill, pipeline, number, tmp_path):
    pipeline.failure = OSError(number, os.strerror(number))
    code, out, err = distill("run", "tiny")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: the disk is full (")
    assert f"MB free at {tmp_path / 'runs' / 'tiny'})" in err
    assert "rerun the same command, which resumes" in err


@pytest.mark.parametrize(
    "bug", [KeyError("a bug"), ConnectionError("a bug"), AssertionError("a bug"), ValueError("a bug")]
)
def test_a_bug_keeps_its_traceback(distill, pipeline, bug):
    pipeline.failure = bug
    with pytest.raises(type(bug), match="a bug"):
        distill("run", "tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "tinny"], "no recipe is named 'tinny'; did you mean tiny?"),
        (["run", "tiny", "--set", "train.lr=1"], "--set train.lr: unknown key; did you mean train.learning_rate?"),
        (["run", "tiny", "--set", "seed=x"], '--set seed: should be a valid integer, not "x"'),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        (["run"], "Missing argument 'RECIPE'; see `distill run --help`"),
        (["run", "tiny", "--zzz"], "No such option: --zzz; see `distill run --help`"),
        (["run", "tiny", "--fresh", "all"], "'all' is not one of 'generate', 'filter', 'train', 'eval'"),
        (["rnu"], "No such command 'rnu'"),
        (["recipes", "show"], "Missing argument 'NAME'; see `distill recipes show --help`"),
        (["students", "show", "tiny-r1"], "no student is named 'tiny-r1'"),
    ],
)
def test_wrong_input_is_one_line_exit_code_2_and_writes_nothing(distill, pipeline, arguments, message, tmp_path):
    code, out, err = distill(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert pipeline.calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["recipes"], ["teachers"], ["students"], ["benchmarks"]])
def test_without_a_command_the_help_is_printed(distill, arguments):
    code, out, err = distill(*arguments)
    assert code == 2
    assert "Usage: distill" in out + err
    assert "error" not in out + err


@pytest.mark.parametrize("command", [[], ["run"], ["eval"], ["report"], ["recipes"], ["recipes", "check"]])
def test_help_is_there_for_every_command(distill, command):
    code, out, err = distill(*command, "--help")
    assert (code, err) == (0, "")
    assert " ".join(["Usage: distill", *command]) in out


def test_version(distill):
    assert distill("--version") == (0, f"distill {__version__}\n", "")


# ---- the catalogs


@pytest.mark.parametrize("kind", list(catalog.MODELS))
def test_list_names_every_entry(distill, kind):
    code, out, _ = distill(f"{kind}s", "list")
    assert code == 0
    assert all(name in out for name in catalog.entries(kind))


def test_show_prints_the_file_as_it_is(distill):
    assert distill("recipes", "show", "tiny") == (0, catalog.find("recipe", "tiny").read_text(), "")


def test_show_writes_defaults_out_when_asked_or_overridden(distill):
    assert distill("recipes", "show", "tiny", "--resolved") == (0, catalog.load_recipe("tiny").to_yaml(), "")
    assert distill("recipes", "show", "tiny", "--set", "seed=9") == (
        0,
        catalog.load_recipe("tiny", ["seed=9"]).to_yaml(),
        "",
    )


def test_copy_prints_where_the_copy_is_and_the_copy_runs(distill, pipeline):
    assert distill("recipes", "copy", "tiny", "mine.yaml") == (0, "mine.yaml\n", "")
    assert distill("run", "mine.yaml")[0] == 0
    assert pipeline.calls[0][1] == Path("runs/mine")
    code, _, err = distill("recipes", "copy", "tiny", "mine.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert "mine.yaml already exists" in err


def test_check_reports_every_entry_and_fails_if_one_is_wrong(distill, tmp_path):
    (tmp_path / "bad.yaml").write_text("name: bad\n")
    extended = catalog.find("recipe", "r1-distill-qwen-7b").read_text()
    assert "  max_position_embeddings: 131072\n" in extended
    (tmp_path / "past.yaml").write_text(extended.replace("  max_position_embeddings: 131072\n", ""))
    code, out, err = distill("recipes", "check", "tiny", "bad.yaml", "r1-distill-qwen-7b", "past.yaml")
    assert code == 2
    assert out.startswith(
        "tiny: ok\nr1-distill-qwen-7b: ok\npast.yaml: ok\n  note: train.max_length is past the context"
    )
    assert err == (
        "error: bad.yaml: teacher: is missing, and has no default; student: is missing, and has no default; "
        "eval: is missing, and has no default\n"
    )


@pytest.mark.parametrize("kind", ["recipe", "benchmark"])
def test_check_without_names_reads_the_whole_catalog(distill, kind):
    code, out, err = distill(f"{kind}s", "check")
    assert (code, err) == (0, "")
    assert all(f"{name}: ok" in out for name in catalog.entries(kind))


def test_schema_is_what_is_committed(distill):
    committed = (catalog.folder("recipe") / "recipe.schema.json").read_text()
    assert distill("recipes", "schema") == (0, committed, "")


# ---- as a process


def test_the_clone_runs_without_being_installed(tmp_path):
    command = [sys.executable, str(ROOT / "cli.py"), "run", "tinny"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no recipe is named 'tinny'")


@pytest.mark.parametrize("arguments", ["--version", "recipes schema", "recipes list"])
def test_a_reader_that_has_left_ends_the_command_quietly(arguments):
    command = f"{sys.executable} cli.py {arguments} | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "")
