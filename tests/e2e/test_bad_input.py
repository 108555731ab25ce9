"""What a user gets wrong: one line with the fix, exit code 2, nothing written. Full disk: 1, and the rerun resumes."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill import cli
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "teachers" / "tiny-r1"
Distill = Callable[..., tuple[int, str]]


@pytest.fixture
def distill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Distill:
    """`distill("run", "tiny")` → (exit code, what it printed to stderr), in an empty directory."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["distill", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err

    return call


@pytest.fixture
def refused(distill: Distill) -> Callable[..., str]:
    """The one line with which a command is refused; fails unless it exits with 2 and leaves nothing behind."""

    def call(*arguments: str) -> str:
        before = sorted(Path().rglob("*"))
        code, err = distill(*arguments)
        assert code == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert sorted(Path().rglob("*")) == before
        return err

    return call


def teacher_card(directory: Path) -> str:
    """A copy of the tiny teacher that may be damaged; returns its card's path."""
    shutil.copytree(TEACHER, directory)
    return str(directory / "card.yaml")


def test_an_unknown_recipe_lists_the_known_ones(refused: Callable[..., str]) -> None:
    err = refused("run", "tyni")
    assert "tyni" in err and "tiny" in err


def test_an_unknown_key_names_the_nearest(refused: Callable[..., str], recipe_file: Callable[..., Path]) -> None:
    err = refused("run", str(recipe_file(train={"learning_rat": 1e-3})))
    assert "train.learning_rat" in err and "did you mean train.learning_rate?" in err


def test_a_wrong_type_is_named(refused: Callable[..., str], recipe_file: Callable[..., Path]) -> None:
    err = refused("run", str(recipe_file(generate={"samples": "many"})))
    assert "generate.samples" in err and "integer" in err


def test_a_missing_weights_file(refused: Callable[..., str], recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    card = teacher_card(tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    err = refused("run", str(recipe_file(teacher=card)))
    assert "safetensors" in err and str(tmp_path / "teacher") in err


def test_a_truncated_weights_file(
    refused: Callable[..., str], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    card = teacher_card(tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    err = refused("generate", str(recipe_file(teacher=card)))
    assert str(weights) in err


DOWN = "model.layers.2.mlp.experts.5.down_proj.weight"


def _nan_code(tensors: dict[str, torch.Tensor]) -> None:
    tensors[DOWN].view(torch.uint8)[1, 2] = 0x7F


def _no_scale(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[DOWN + "_scale_inv"]


def _other_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[DOWN] = tensors[DOWN][:-1].contiguous()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_nan_code, "holds FP8 NaN codes"), (_no_scale, "_scale_inv is missing"), (_other_shape, "has shape")],
)
def test_damaged_weights_are_named_with_tensor_and_file(
    damage: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    refused: Callable[..., str],
    recipe_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    card = teacher_card(tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(weights)
    damage(tensors)
    save_file(tensors, weights)
    err = refused("generate", str(recipe_file(teacher=card)))
    assert message in err and DOWN in err and str(weights) in err


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "unheard_of"}, "model_type is 'unheard_of'"), ({"hidden_act": "gelu"}, "hidden_act is 'gelu'")],
)
def test_a_family_that_is_not_supported(
    change: dict[str, str],
    message: str,
    refused: Callable[..., str],
    recipe_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    card = teacher_card(tmp_path / "teacher")
    config = tmp_path / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    err = refused("generate", str(recipe_file(teacher=card)))
    assert message in err and str(config) in err


def test_a_memory_budget_that_is_too_small(refused: Callable[..., str], recipe_file: Callable[..., Path]) -> None:
    err = refused("generate", str(recipe_file(engine={"memory_budget": 0.001})))
    assert "memory_budget is 0.001 GiB" in err and "raise it" in err


def test_a_broken_line_of_a_prompt_file(
    refused: Callable[..., str], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "1 +\n', encoding="utf-8")
    err = refused("generate", str(recipe_file(prompts=[{"kind": "file", "path": str(path)}])))
    assert "prompts.jsonl" in err and "line 2" in err


def test_a_prompt_longer_than_the_context(
    refused: Callable[..., str], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write('{"question": "' + "1 + " * 4096 + '1", "answer": "4097"}\n')
    err = refused("generate", str(recipe_file(prompts=[{"kind": "file", "path": str(path)}])))
    assert "context of 4096" in err


def test_a_run_directory_of_another_recipe(
    distill: Distill, refused: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    few = [{"kind": "procedural", "name": "arithmetic", "limit": 2}]
    assert distill("generate", str(recipe_file(prompts=few)), "--run-dir", "mine") == (0, "")
    err = refused("generate", str(recipe_file(prompts=few, name="other")), "--run-dir", "mine")
    assert "holds a run of recipe small, not of other" in err and "--run-dir" in err


def test_other_settings_are_refused_with_both_ways_out(
    distill: Distill, refused: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    few = [{"kind": "procedural", "name": "arithmetic", "limit": 2}]
    recipe = str(recipe_file(prompts=few))
    assert distill("generate", recipe) == (0, "")
    err = refused("generate", recipe, "--set", "generate.sampling.temperature=0.7")
    assert "sampling.temperature: 0.6 → 0.7" in err and "--fresh generate" in err and "--run-dir" in err


def test_a_run_directory_in_use_by_another_process(
    distill: Distill, refused: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    few = [{"kind": "procedural", "name": "arithmetic", "limit": 2}]
    recipe = str(recipe_file(prompts=few))
    assert distill("generate", recipe) == (0, "")
    holder = (
        "import sys\nfrom pathlib import Path\nfrom distill.catalog import load_recipe\nfrom distill.run import Run\n"
        "with Run(Path(sys.argv[2]), load_recipe(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", holder, recipe, "runs/small"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        err = refused("generate", recipe)
        assert f"in use by process {process.pid}" in err
        process.communicate()
    assert distill("generate", recipe) == (0, "")


def test_a_read_only_run_directory(
    refused: Callable[..., str], recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permission bits do not bind root, who runs many a container; the kernel's refusal is put in by hand."""

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "read-only file system; choose another --run-dir" in refused("generate", str(recipe_file()))


def test_a_disk_that_fills_in_the_middle(
    distill: Distill, recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(recipe_file(prompts=[{"kind": "procedural", "name": "arithmetic", "limit": 5}]))
    append, stored = Ledger.append, 0

    def fills(self: Ledger, rows: object) -> None:
        nonlocal stored
        if stored == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        stored += 1
        append(self, rows)  # type: ignore[arg-type]

    with monkeypatch.context() as full:
        full.setattr(Ledger, "append", fills)
        code, err = distill("generate", recipe)
    assert code == 1
    assert "the disk is full" in err and "rerun the same command" in err and err.count("\n") == 1
    before = {trace.key: trace for trace in TraceStore(Path("runs/small/traces"))}
    assert len(before) == 4
    assert distill("generate", recipe) == (0, "")
    after = {trace.key: trace for trace in TraceStore(Path("runs/small/traces"))}
    assert len(after) == 10
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("change", ["eval.benchmarks=[nope]", "student=./nope.yaml", "teacher=nope"])
def test_what_a_later_stage_needs_is_looked_for_before_the_first(
    refused: Callable[..., str], recipe_file: Callable[..., Path], change: str
) -> None:
    assert "nope" in refused("run", str(recipe_file()), "--set", change)
