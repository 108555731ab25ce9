"""The teacher's distributions of several trace sets: each row gets those of its own trace, whatever was interrupted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from train_support import make_recipe, sums

from distill.artefacts import RunPaths
from distill.backends.scoring import remedy
from distill.models import Model
from distill.recipe.sources import MixedKept, MixedRun
from distill.record import StageRecord
from distill.traces.store import TraceStore
from distill.traces.trace import Trace
from distill.train.rows import teacher
from distill.train.rows.prepare import is_teachers

asked: list[str] = []


def scored(trace: Trace) -> Trace:
    """With one token, whose log-probability tells the texts apart."""
    top = ((((1, -float(len(trace.text))),)),)
    return replace(trace, completion_token_ids=(1,), logprobs=(-1.0,), top_logprobs=top)


@contextmanager
def scoring(*_: object) -> Iterator[object]:
    def score(traces: list[Trace], store: TraceStore) -> list[Trace]:
        asked.extend(trace.text for trace in traces)
        done = [scored(trace) for trace in traces]
        with store:
            store.append(done)
        return done

    yield score


class Rows:
    """Rows of every trace of the sets."""

    def __init__(self, sets: Sequence[Sequence[Trace]]) -> None:
        import numpy as np

        self.keys = [trace.key for traces in sets for trace in traces]
        self.sources = np.array([number for number, traces in enumerate(sets) for _ in traces])

    def __len__(self) -> int:
        return len(self.keys)


def all_of(
    sets: Sequence[Sequence[Trace]], directory: Path, own: bool = True, least: int = 1
) -> set[tuple[int, str, float]]:
    reads = [teacher.TraceSet(lambda traces=traces: iter(traces), own) for traces in sets]  # type: ignore[misc]
    found = teacher._with_logprobs(reads, None, None, Rows(sets), 8, least, directory)  # type: ignore[arg-type]
    return {(number, trace.text, trace.top_logprobs[0][0][1]) for number, trace in found if trace.top_logprobs}


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> list[list[Trace]]:
    """Two sets of three traces of the same prompts and samples, with other texts."""
    monkeypatch.setattr(teacher, "_scoring", scoring)
    asked.clear()
    first = sums(3)
    return [first, [replace(trace, text=trace.text + " Indeed.") for trace in first]]


def expected(sets: Sequence[Sequence[Trace]]) -> set[tuple[int, str, float]]:
    return {(number, trace.text, -float(len(trace.text))) for number, traces in enumerate(sets) for trace in traces}


def test_samples_of_one_prompt_in_two_sets_keep_their_own(sets: list[list[Trace]], tmp_path: Path) -> None:
    assert all_of(sets, tmp_path) == expected(sets) and len(asked) == 6
    assert all_of(sets, tmp_path) == expected(sets) and len(asked) == 6, "all were stored"


def test_what_was_scored_before_an_interruption_is_not_scored_again(sets: list[list[Trace]], tmp_path: Path) -> None:
    with TraceStore(tmp_path / "1") as store:
        store.append([scored(sets[1][0])])
    assert all_of(sets, tmp_path) == expected(sets)
    assert sorted(asked) == sorted(trace.text for trace in [*sets[0], *sets[1][1:]])


def test_scores_of_another_text_are_never_taken(sets: list[list[Trace]], tmp_path: Path) -> None:
    assert all_of(sets, tmp_path) == expected(sets)
    turned = sets[::-1]
    assert all_of(turned, tmp_path) == expected(turned) and len(asked) == 12


def test_own_log_probabilities_need_no_teacher(sets: list[list[Trace]], tmp_path: Path) -> None:
    with_own = [[scored(trace) for trace in traces] for traces in sets]
    assert all_of(with_own, tmp_path) == expected(sets) and not asked


def test_numbers_of_another_teacher_or_too_few_of_them_are_not_taken(sets: list[list[Trace]], tmp_path: Path) -> None:
    other = [[replace(scored(trace), top_logprobs=(((1, 0.5),),)) for trace in traces] for traces in sets]
    assert all_of(other, tmp_path / "own") != expected(sets) and not asked
    assert all_of(other, tmp_path / "other", own=False) == expected(sets) and len(asked) == 6
    assert all_of(other, tmp_path / "few", least=2) == expected(sets) and len(asked) == 12


def test_a_run_of_the_same_teacher_is_known_by_its_record(tmp_path: Path) -> None:
    recipe, model = make_recipe(tmp_path), Model("teacher", tmp_path)
    model.identity = {"weights": "abc", "chat_template": "own", "date": "today"}  # type: ignore[misc]
    settings = {"teacher.weights": "abc", "teacher.chat_template": "own", "teacher.date": "yesterday", "seed": 1}
    times = {"begun": "", "resumed": None, "seconds": 0.0, "finished": None, "summary": None, "files": {}}
    for name, changes in {"same": {}, "other": {"teacher.weights": "abd"}, "mode": {"teacher.thinking": True}}.items():
        (tmp_path / name / "stages").mkdir(parents=True)
        record = StageRecord.model_validate({"settings": settings | changes, "extent": {}, **times})
        record.write(RunPaths(tmp_path / name).record("generate"))

    def known(name: str) -> bool:
        return is_teachers(MixedRun(kind="run", path=str(tmp_path / name)), recipe, model)

    assert [known(name) for name in ("same", "other", "mode", "import")] == [True, False, False, False]
    kept = MixedKept(kind="kept")
    assert is_teachers(kept, recipe, model)
    for name, whether in {"same": True, "other": False}.items():
        copied = recipe.model_copy(update={"traces": (MixedRun(kind="run", path=str(tmp_path / name)),)})
        assert is_teachers(kept, copied, model) == whether


def test_a_server_that_cannot_score_says_how_many_tokens_the_traces_list() -> None:
    trace = replace(scored(sums(1)[0]), top_logprobs=(((1, -1.0), (2, -2.0)),))
    assert "list 2 likely tokens (generate.logprobs) and 32 are asked for: set train.objective.top_k to 2" in remedy(
        [trace], 32
    )
    assert "sampled with generate.logprobs" in remedy(sums(1), 32)
