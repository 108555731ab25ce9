"""What tools/real_results.py publishes of made-up runs, and which directories it refuses."""

import json
import sys
from pathlib import Path

import pytest
from report_support import make_run

RIGHT = ("base", "student", "teacher")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def publish(monkeypatch: pytest.MonkeyPatch, out: Path, *runs: str) -> dict:
    from real_results import main

    monkeypatch.setattr(sys, "argv", ["real_results.py", "--out", str(out), *runs])
    main()
    return json.loads((out / "real.json").read_text())


def test_scores_gains_and_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    found = publish(monkeypatch, tmp_path / "out", f"base={run}", f"student={run}", f"again={run}", f"teacher={run}")
    assert (tmp_path / "out" / "real.png").stat().st_size > 5000
    scores, gain = found["scores"], found["gain"]
    stored = {name: json.loads((run / f"eval/tiny-arithmetic/{name}/scores.json").read_text()) for name in RIGHT}
    for name in RIGHT:
        assert scores[name]["pass@1"] == stored[name]["pass@1"]
        assert scores[name]["problems"] == 40
    assert scores["again"] == scores["student"]
    assert gain["value"] == pytest.approx(scores["student"]["pass@1"]["value"] - scores["base"]["pass@1"]["value"])
    assert gain["low"] < gain["value"] < gain["high"]
    assert (gain["gained"] - gain["lost"]) / 40 == pytest.approx(gain["value"])
    assert found["gains"].keys() == {"student", "again", "teacher"}
    assert found["stages"]["student"]["train"]["hours"] == round(94 / 3600, 3)
    assert found["settings"] == {"student": {}, "again": {}}
    assert str(tmp_path) not in json.dumps(found)


def test_what_cannot_be_published_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    untrained = make_run(tmp_path / "untrained", upto="train")
    for runs, said in (
        ([f"base={run}"], "missing student"),
        ([f"base={run}", f"student={untrained}"], "expected evaluations on one benchmark; found none"),
        (
            [f"base={run}", f"student={run / 'eval'}"],
            "an evaluation of base alone; found base, student, teacher",
        ),
    ):
        with pytest.raises(SystemExit, match=said):
            publish(monkeypatch, tmp_path / "out", *runs)
    assert not (tmp_path / "out").exists()
