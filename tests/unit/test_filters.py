"""Each filter on cases that can be judged by eye, then all of them in a run."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.chat import split_reasoning
from distill.errors import UserError
from distill.filters import check_gradable, filter_traces
from distill.filters.correct import check_correct
from distill.filters.dedup import check_duplicates
from distill.filters.finish import check_finish
from distill.filters.format import check_format
from distill.filters.judged import Judged
from distill.filters.length import check_length, length, reasoning_length
from distill.filters.select import check_selected
from distill.grading import Grade
from distill.grading import math as mathematics
from distill.prompts.prompt import Prompt
from distill.recipe import Recipe
from distill.run import Run
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore, read_traces
from distill.traces.trace import Trace, Verdict

GOOD = "<think>\n20 + 22 = 42\n</think>\nThe answer is \\boxed{42}."


def make_trace(text: str = GOOD, question: str = "20 + 22?", sample: int = 0, tokens: int = 0, **more: Any) -> Trace:
    reasoning, response = split_reasoning(text)
    prompt = more.pop("prompt", Prompt.from_question(question, "42"))
    trace = Trace(prompt, sample, 0, text, reasoning, response, "stop", "t", completion_token_ids=tuple(range(tokens)))
    return replace(trace, **more)


def make_recipe(**settings: Any) -> Recipe:
    names = {"name": "r", "teacher": "t", "student": "s", "eval": {"benchmarks": []}}
    prompts = settings.pop("prompts", [{"kind": "procedural", "name": "arithmetic"}])
    return Recipe.model_validate(names | {"prompts": prompts, "filter": settings})


def add(directory: Path, traces: Iterable[Trace]) -> None:
    (directory / "traces").mkdir(parents=True, exist_ok=True)
    with TraceStore(directory / "traces") as store:
        store.append(traces)


def run_filter(directory: Path, traces: Iterable[Trace] = (), fresh: bool = False, **settings: Any) -> dict[str, Any]:
    with Run(directory, make_recipe(**settings)) as run:
        add(directory, traces)
        if fresh:
            run.fresh("filter")
        return filter_traces(run)


def samples(directory: Path, which: str = "kept") -> dict[int, dict[str, str]]:
    """Sample number → filter → reason."""
    return {t.sample: {v.filter: v.reason for v in found} for t, found in read_traces(directory / "filtered" / which)}


# One filter at a time


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, "ok"),
        ("<think>a</think>b", "ok"),
        ("\n<think>a</think>b", "ok"),
        ("42", "no_think"),
        ("", "no_think"),
        ("<think>on and on", "not_closed"),
        ("<think>a<think>b", "not_closed"),
        ("a</think>b", "not_opened"),
        ("<think>a</think>b<think>c</think>d", "several_blocks"),
        ("<think>a<think>b</think>c", "several_blocks"),
        ("<think>a</think></think>b", "several_blocks"),
        ("Well, <think>a</think>b", "text_before"),
        ("</think>a<think>b", "text_before"),
        ("<think> \n </think>b", "empty_reasoning"),
        ("<think>a</think> \n", "no_response"),
    ],
)
def test_format(text: str, reason: str) -> None:
    verdict = check_format(make_trace(text))
    assert (verdict.filter, verdict.keep, verdict.reason) == ("format", reason == "ok", reason)


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " "]), max_size=7).map("".join))
def test_format_keeps_just_what_its_rule_says(text: str) -> None:
    rule = re.fullmatch(r"\s*<think>((?:(?!</?think>).)*)</think>((?:(?!</?think>).)*)", text, re.DOTALL)
    keep = rule is not None and bool(rule[1].strip()) and bool(rule[2].strip())
    assert check_format(make_trace(text)).keep is keep


def test_finish() -> None:
    assert check_finish(make_trace()) == Verdict("finish", True, "ok", {"finish_reason": "stop"})
    cut = make_trace(finish_reason="length")
    assert check_finish(cut) == Verdict("finish", False, "truncated", {"finish_reason": "length"})


def test_unverifiable_is_dropped_under_its_own_reason() -> None:
    assert check_correct(Grade("correct", "equal", {"gold": "42"})) == Verdict(
        "correct", True, "correct", {"judged": "equal", "gold": "42"}
    )
    assert check_correct(Grade("wrong", "not equal")).reason == "wrong"
    timeout = check_correct(Grade("unverifiable", "timeout"))
    assert (timeout.keep, timeout.reason) == (False, "unverifiable: timeout")


def test_length_is_in_teacher_tokens_where_there_are_any() -> None:
    assert length(make_trace("<think>a b</think> c", tokens=7)) == (7, "teacher tokens")
    assert length(make_trace("<think>a b</think> c")) == (3, "words")
    assert reasoning_length(make_trace("<think>aaaa</think>!", tokens=20)) == 4  # 4 of 20 characters, of 20 tokens
    assert reasoning_length(make_trace("")) == 0
    limits = {count: check_length(make_trace(tokens=count), 10, 20) for count in (9, 10, 20, 21)}
    assert {count: v.reason for count, v in limits.items()} == {9: "too_short", 10: "ok", 20: "ok", 21: "too_long"}
    assert limits[9].evidence == {"length": 9, "unit": "teacher tokens"}
    assert check_length(make_trace(tokens=10**6), None, None).keep


def judged(*traces: Trace) -> list[Judged]:
    return [Judged.of(trace, []) for trace in traces]


def test_duplicates_are_found_within_a_prompt_and_up_to_white_space() -> None:
    other = make_trace(question="21 + 21?", sample=5)
    spaced = make_trace(GOOD.replace(" ", "\n  "), sample=2)
    different = make_trace(GOOD.replace("20 + 22", "22 + 20"), sample=3)
    verdicts = check_duplicates(judged(spaced, make_trace(sample=1), different, other))
    assert {key[1]: (v.keep, v.evidence) for key, v in verdicts.items()} == {
        1: (True, {}),
        2: (False, {"of_sample": 1}),
        3: (True, {}),
        5: (True, {}),
    }


def test_select() -> None:
    traces = judged(*(make_trace(sample=i, tokens=tokens) for i, tokens in enumerate([50, 30, 40, 30])))
    traces += judged(make_trace(question="21 + 21?", sample=0, tokens=99))
    other = traces[-1].key

    def kept(how: Any, per_prompt: int = 2, seed: int = 0, order: int = 1) -> set[tuple[str, int]]:
        verdicts = check_selected(traces[::order], per_prompt, how, seed)
        assert verdicts.keys() == {trace.key for trace in traces}
        return {key for key, verdict in verdicts.items() if verdict.keep}

    def numbers(keys: set[tuple[str, int]]) -> set[int]:
        return {sample for prompt, sample in keys if prompt != other[0]}

    assert numbers(kept("first")) == {0, 1}
    assert numbers(kept("shortest")) == {1, 3}
    assert numbers(kept("shortest", per_prompt=1)) == {1}  # of two equally long ones the first
    draws = {frozenset(numbers(kept("random", seed=seed))) for seed in range(50)}
    assert len(draws) == 6, "every pair of four comes up"
    assert kept("random", seed=3) == kept("random", seed=3, order=-1)
    assert kept("random", per_prompt=2, seed=3) < kept("random", per_prompt=3, seed=3)
    assert all(other in kept(how) for how in ("first", "shortest", "random"))


def test_a_ledger_row_holds_all_of_it() -> None:
    one = Judged.of(make_trace(tokens=9), [Verdict("format", False, "no_think", {"think": 0})])
    assert Judged.from_row(json.loads(json.dumps(one.to_row()))) == one


# All of them


WRONG = GOOD.replace("boxed{42}", "boxed{41}")
MIXED = [
    make_trace(sample=0, tokens=30),
    make_trace(sample=1, tokens=30),  # the same again
    make_trace(WRONG, sample=2, tokens=30),
    make_trace("<think>on and on", sample=3, tokens=99, finish_reason="length"),
    make_trace("It is \\boxed{42}", sample=4, tokens=5),
    make_trace(GOOD + " Indeed.", sample=5, tokens=33),
    make_trace(GOOD + " Quite so.", sample=6, tokens=70),
]


def test_every_verdict_is_recorded_and_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run_filter(tmp_path / "run", MIXED, max_tokens=64, per_prompt=1, select="shortest")
    ok = {"format": "ok", "finish": "ok", "correct": "correct", "length": "ok"}
    assert samples(tmp_path / "run") == {0: ok | {"dedup": "ok", "select": "ok"}}
    assert samples(tmp_path / "run", "dropped") == {
        1: ok | {"dedup": "duplicate"},
        2: ok | {"correct": "wrong"},
        3: {
            "format": "not_closed",
            "finish": "truncated",
            "correct": "unverifiable: no answer found",
            "length": "too_long",
        },
        4: ok | {"format": "no_think"},
        5: ok | {"dedup": "ok", "select": "surplus"},
        6: ok | {"length": "too_long"},
    }
    steps = [(step["filter"], step["entered"], step["dropped"], step["kept"]) for step in summary["funnel"]]
    assert steps == [
        ("format", 7, 2, 5),
        ("finish", 5, 0, 5),
        ("correct", 5, 1, 4),
        ("length", 4, 1, 3),
        ("dedup", 3, 1, 2),
        ("select", 2, 1, 1),
    ]
    assert summary["funnel"][0]["reasons"] == {"not_closed": 1, "no_think": 1}
    assert summary["verdicts"]["length"] == {"ok": 5, "too_long": 2}
    figures = ("total", "kept", "dropped", "prompts", "prompts_kept", "tokens_kept", "unit")
    assert [summary[figure] for figure in figures] == [7, 1, 6, 1, 1, 30, "teacher tokens"]
    share = round(30 * len("20 + 22 = 42") / len(GOOD))
    assert (summary["reasoning_median"], summary["reasoning_mean"]) == (share, share)
    shown = capsys.readouterr().out
    assert "kept 1 of 7 traces" in shown and str(tmp_path / "run/filtered/kept") in shown


def test_every_filter_can_be_turned_off(tmp_path: Path) -> None:
    summary = run_filter(tmp_path / "run", MIXED, format=False, finish=False, correct=False, dedup=False)
    assert (summary["kept"], summary["funnel"], summary["verdicts"]) == (7, [], {})
    summary = run_filter(tmp_path / "run", fresh=True, format=False, finish=False, correct=True, dedup=False)
    assert summary["verdicts"] == {"correct": {"correct": 5, "wrong": 1, "unverifiable: no answer found": 1}}


def test_finished_is_finished_and_more_samples_are_graded_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    first = run_filter(run, MIXED[:3])
    capsys.readouterr()
    assert run_filter(run) == first
    assert capsys.readouterr().out == ""
    graded: list[str] = []
    find = mathematics.final_answer
    monkeypatch.setattr(mathematics, "final_answer", lambda response: graded.append(response) or find(response))
    assert run_filter(run, MIXED[3:])["total"] == 7
    assert graded == [trace.response for trace in MIXED[3:]]
    keys = [tuple(row["key"]) for row in Ledger(run / "filtered/verdicts.jsonl").rows()]
    assert sorted(keys) == sorted(trace.key for trace in MIXED)


def test_a_trace_whose_text_changed_is_judged_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_filter(run, MIXED[:3])["kept"] == 1
    for path in (run / "traces").iterdir():
        path.unlink()
    changed = make_trace(GOOD + " Yes.", sample=2)
    assert run_filter(run, [MIXED[0], changed])["kept"] == 2
    assert samples(run).keys() == {0, 2}


def test_other_settings_are_refused_but_not_other_means(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_filter(run, MIXED, workers=1)
    run_filter(run, workers=3)
    with pytest.raises(UserError, match="min_tokens"):
        run_filter(run, min_tokens=10)


def test_nothing_to_filter_and_nothing_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no traces to filter; run `distill generate` first"):
        run_filter(tmp_path / "empty")
    assert not (tmp_path / "empty" / "filtered").exists()
    with pytest.raises(UserError) as nothing:
        run_filter(tmp_path / "run", [MIXED[2], MIXED[3], make_trace(WRONG, question="more?")])
    message = str(nothing.value)
    assert message.startswith("nothing kept of 3 traces: correct dropped 2, 2 of them as 'wrong'")
    assert "\n" not in message
    assert samples(tmp_path / "run", "dropped").keys() == {0, 2, 3}, "they can be read"


def test_a_task_without_a_grader_is_refused_before_any_work(tmp_path: Path) -> None:
    code = [{"kind": "file", "path": "problems.jsonl", "task": "code"}]
    with pytest.raises(UserError, match=r"^filter.correct: task 'code' .* set it to false"):
        run_filter(tmp_path / "run", MIXED, prompts=code)
    assert not (tmp_path / "run" / "filtered").exists()
    check_gradable(make_recipe(prompts=code, correct=False))


def test_hostile_text_goes_through(tmp_path: Path) -> None:
    """Lone surrogates, null bytes and line separators in a trace come out as they went in."""
    odd = "<think>\ud800 \x00 \u2028</think>\\boxed{42}\udfff"
    run_filter(tmp_path / "run", [make_trace(odd, tokens=3)])
    assert [trace.text for trace, _ in read_traces(tmp_path / "run/filtered/kept")] == [odd]
