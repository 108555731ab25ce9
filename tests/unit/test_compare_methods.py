"""What the learning curves of tools/compare_methods.py count, by hand."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from distill.train.rows.batches import Row

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def row(prompt: str, tokens: int, source: int = 0, sampled: bool = False, taught: bool = False) -> Row:
    teacher = (np.zeros((tokens, 1), np.int32), np.zeros((tokens, 1), np.float32)) if taught else None
    own = np.ones((4, tokens), np.float32) if sampled else None
    return Row((prompt, 0), np.zeros(5 + tokens, np.int32), 5, source, teacher=teacher, sampled=own)


def loop(step: int = 1, total: int = 10) -> SimpleNamespace:
    return SimpleNamespace(position=SimpleNamespace(step=step), total=total)


def test_a_teachers_trace_is_produced_once_and_trained_each_time() -> None:
    from learning_curve import Recorder

    recorder = Recorder(Path(), Path(), 2, (0.0, 1.0), [["kept"]])
    first = loop()
    recorder.count(first, [row("a", 10), row("b", 20)])
    recorder.count(first, [row("a", 10)])
    assert (recorder.kept, recorder.trained, recorder.scored, recorder.phase) == (30, 40, 0, 0)


def test_what_the_student_wrote_costs_the_teacher_only_where_it_scored() -> None:
    from learning_curve import Recorder

    recorder = Recorder(Path(), Path(), 2, (0.0, 1.0), [["kept"], ["kept"], ["kept", "own"]])
    recorder.count(loop(), [row("a", 10, sampled=True, taught=True)])  # on-policy
    recorder.count(loop(), [row("a", 7, sampled=True)])  # rewards
    recorder.count(loop(), [row("b", 5, source=1), row("c", 3, source=0)])  # own right answers, and traces
    assert (recorder.kept, recorder.scored, recorder.trained, recorder.phase) == (3, 10, 25, 2)


def test_evaluations_are_spread_over_a_phase_and_its_last_step_is_among_them() -> None:
    from learning_curve import Recorder

    recorder = Recorder(Path(), Path(), 3, (0.0, 1.0), [["kept"]])
    assert [step for step in range(1, 11) if recorder.due(loop(step))] == [4, 7, 10]


def test_the_bar_is_reached_between_two_points() -> None:
    from learning_curve import reached

    points = [
        {"trained": trained, "tiny-arithmetic": {"value": score}}
        for trained, score in ((100, 0.45), (200, 0.8), (300, 0.9))
    ]
    assert reached(points, "trained") == pytest.approx(250)
    assert reached(points[:2], "trained") is None


def test_seeds_are_samples_of_a_problem() -> None:
    from compare_methods import final
    from learning_curve import AXES, BENCHMARKS

    rights = ([True, True, False], [True, False, False])
    seeds = [
        {"right": dict.fromkeys(BENCHMARKS, right), "to_85": dict.fromkeys(AXES, 10.0 * (i + 1))}
        for i, right in enumerate(rights)
    ]
    summary = final(seeds)
    assert summary["tiny-arithmetic"]["value"] == pytest.approx(0.5)
    assert summary["to_85"]["seconds"] == 15
    seeds[0]["to_85"]["seconds"] = None  # a seed that never got there has no median
    assert final(seeds)["to_85"]["seconds"] is None


def test_every_method_is_a_recipe_that_loads() -> None:
    from compare_methods import METHODS, settings_of

    from distill.catalog import load_recipe

    for name, method in METHODS.items():
        recipe = load_recipe("tiny", settings_of(method, 0, "tiny-r1"))
        assert recipe.train.seed == 0, name


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("docs/*.json"), *ROOT.glob("perf/*.json")]), ids=lambda path: path.name
)
def test_published_figures_name_no_place_of_a_machine(path: Path) -> None:
    def texts(value: object) -> list[str]:
        if isinstance(value, dict):
            return [text for pair in value.items() for each in pair for text in texts(each)]
        return [text for each in value for text in texts(each)] if isinstance(value, list) else [str(value)]

    places = [text for text in texts(json.loads(path.read_text())) if re.search(r"(^|[=\s\"'])[/~]\w", text)]
    assert not places


def test_ratios_are_ours_by_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "perf"))
    sys.modules.pop("memory", None)
    from onpolicy import ratios

    ours, trl = {"samples/s": 120.0, "peak memory, GB": 0.5}, {"samples/s": 40.0, "peak memory, GB": 1.0}
    assert ratios(ours, trl) == {"samples_per_s": 3.0, "peak_memory": 0.5}
