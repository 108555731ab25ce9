"""How often a run decodes its traces: each pass over a large store takes minutes, so passes are counted.

One pass each: compaction, filtering, training, the report (the kept and the dropped, which together are the store).
"""

from pathlib import Path

import pytest

from distill.pipeline import run_recipe
from distill.recipe import Recipe
from distill.traces import parts, store


def test_passes_over_the_traces_of_a_run(
    small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: list[str] = []
    opened: list[Path] = []
    open_part = parts.open_part

    monkeypatch.setattr(store, "decoded", lambda directory, traces: passes.append(directory.name) or traces)
    monkeypatch.setattr(parts, "open_part", lambda path: opened.append(path) or open_part(path))
    run = tmp_path / "run"
    run_recipe(small_recipe, run)
    teacher = [name for name in passes if name in ("kept", "dropped")]
    assert sorted(teacher) == ["dropped", "kept", "kept"], "training reads the kept, the report reads both"
    assert passes[:2] == ["traces", "traces"], "compaction and filtering; summaries read columns"
    assert opened

    passes.clear()
    opened.clear()
    capsys.readouterr()
    run_recipe(small_recipe, run)
    assert "nothing to do" in capsys.readouterr().out
    assert passes == [] and opened == [], "a finished run is recognised without reading a trace"
