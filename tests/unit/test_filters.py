"""Each filter on its own examples and on cases that can be judged by eye, then all of them in a run."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from filter_support import GOOD, ExampleResources, add, choose, make_recipe, make_trace, run_filter, samples
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distill.errors import UserError
from distill.filters.base import (
    OK,
    Candidate,
    ChoosingFilter,
    Example,
    StreamFilter,
    TraceFilter,
)
from distill.filters.correct import Correct
from distill.filters.decontaminate import QUESTION
from distill.filters.dedup import Dedup
from distill.filters.format import Format
from distill.filters.judged import Judged, common_unit
from distill.filters.length import Length
from distill.filters.pipeline import STAGE, check_gradable
from distill.filters.select import Select
from distill.grading import Grade
from distill.grading import math as mathematics
from distill.prompts.prompt import Prompt
from distill.recipe.filter import FILTERS, Filter, Switch
from distill.run import Run
from distill.traces import store as store_module
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore, read_traces
from distill.traces.trace import Trace, Verdict

# One filter at a time


JUDGING_FILTERS = [kind for kind in FILTERS.values() if issubclass(kind, (TraceFilter, StreamFilter))]
CHOOSING_FILTERS = [kind for kind in FILTERS.values() if issubclass(kind, ChoosingFilter)]


@pytest.mark.parametrize(
    ("kind", "example"),
    [pytest.param(kind, example, id=kind.name) for kind in JUDGING_FILTERS for example in kind.examples],
)
def test_examples_of_filters_that_judge(kind: type[TraceFilter | StreamFilter], example: Example) -> None:
    judging = kind.model_validate(example.settings)
    trace = make_trace(example.text, question=QUESTION, tokens=example.tokens or 0, finish_reason=example.finish_reason)
    is_stream = isinstance(judging, StreamFilter)
    resources = ExampleResources()
    verdict = judging.verdict_on(example.outcome) if is_stream else judging.judge(Candidate(trace, resources))
    assert (verdict.filter, verdict.reason) == (kind.name, example.reason)
    assert verdict.keep is (example.reason == kind.passing)


@pytest.mark.parametrize("kind", CHOOSING_FILTERS)
def test_examples_of_filters_that_choose(kind: type[ChoosingFilter]) -> None:
    for group in kind.examples:
        lengths = group.tokens or (0,) * len(group.texts)
        questions = group.questions or ("20 + 22?",) * len(group.texts)
        traces = [
            make_trace(text, prompt=Prompt.from_question(questions[i], group.gold), sample=i, tokens=lengths[i])
            for i, text in enumerate(group.texts)
        ]
        verdicts = choose(kind.model_validate(group.settings), traces, group.earlier)
        dropped = [any(not verdict.keep for verdict in earlier) for earlier in group.earlier] or [False] * len(traces)
        reasons = [reason for reason, was in zip(group.reasons, dropped, strict=True) if not was]
        assert [verdicts[trace.key].reason for trace in traces if trace.key in verdicts] == reasons
        assert all(verdict.keep is (verdict.reason == kind.passing) for verdict in verdicts.values())


@pytest.mark.parametrize("kind", FILTERS.values())
def test_every_reason_has_an_example_and_every_filter_a_description(kind: Any) -> None:
    is_choosing = issubclass(kind, ChoosingFilter)
    reasons = [reason for example in kind.examples for reason in (example.reasons if is_choosing else [example.reason])]
    assert {reason.partition(": ")[0] for reason in reasons} == set(kind.reasons)
    assert kind.__doc__ and ["profile", *FILTERS] == list(Filter.model_fields)
    assert all(field.description for field in kind.model_fields.values())


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " "]), max_size=7).map("".join))
def test_format_keeps_just_what_its_rule_says(text: str) -> None:
    rule = re.fullmatch(r"\s*<think>((?:(?!</?think>).)*)</think>((?:(?!</?think>).)*)", text, re.DOTALL)
    keep = rule is not None and bool(rule[1].strip()) and bool(rule[2].strip())
    assert Format().judge(Candidate(make_trace(text))).keep is keep


def test_the_evidence_of_a_grade_is_kept() -> None:
    verdict = Correct().verdict_on(Grade("correct", "equal", {"gold": "42"}))
    assert verdict == Verdict("correct", True, "correct", {"judged": "equal", "gold": "42"})


def test_an_answer_in_unfinished_reasoning_is_none() -> None:
    """A server may leave out the opening tag; then a text that ran into the limit is reasoning to its end."""
    assert make_trace("I guess \\boxed{42}, but").answer == "I guess \\boxed{42}, but"
    assert make_trace("I guess \\boxed{42}, but", finish_reason="length").answer == ""
    assert make_trace("<think>\\boxed{42}", finish_reason="length").answer == ""
    assert make_trace("hm</think>\\boxed{42} and so", finish_reason="length").answer == "\\boxed{42} and so"


def test_length_names_its_unit() -> None:
    assert make_trace("<think>a b</think> c", tokens=7).length == (7, "teacher tokens")
    assert make_trace("<think>a b</think> c").length == (3, "words")
    counted = make_trace("a b", completion_tokens=9)
    assert counted.length == (9, "teacher tokens")
    limits = Length(min_tokens=10, max_tokens=20)
    assert limits.judge(Candidate(make_trace("a b"))).evidence == {"length": 2, "unit": "words"}
    for wrong in ({}, {"min_tokens": 3, "max_tokens": 2}, {"max_tokens": 0}):
        with pytest.raises(ValidationError):
            Length.model_validate(wrong)


def judged(*traces: Trace) -> list[Judged]:
    return [Judged.of(trace, []) for trace in traces]


def test_lengths_are_measured_in_one_unit() -> None:
    with_tokens, without = judged(make_trace("<think>aaaa</think>!", tokens=20), make_trace("<think>aaaa</think> ! !"))
    assert common_unit([with_tokens]) == "teacher tokens" and common_unit([with_tokens, without]) == "words"
    assert (with_tokens.length("teacher tokens"), with_tokens.reasoning("teacher tokens")) == (
        20,
        4,
    )  # 4 of 20 characters
    assert (with_tokens.length("words"), without.length("words")) == (1, 3)
    assert judged(make_trace(""))[0].reasoning("words") == 0


def test_duplicates_are_found_within_a_prompt_and_up_to_white_space() -> None:
    other = make_trace(question="21 + 21?", sample=5)
    spaced = make_trace(GOOD.replace(" ", "\n  "), sample=2)
    different = make_trace(GOOD.replace("20 + 22", "22 + 20"), sample=3)
    verdicts = choose(Dedup(), [spaced, make_trace(sample=1), different, other])
    assert {key[1]: (v.keep, v.evidence) for key, v in verdicts.items()} == {
        1: (True, {}),
        2: (False, {"of_sample": 1}),
        3: (True, {}),
        5: (True, {}),
    }


def test_select() -> None:
    traces = [make_trace(sample=i, tokens=tokens) for i, tokens in enumerate([50, 30, 40, 30])]
    traces.append(make_trace(question="21 + 21?", sample=0, tokens=99))
    other = traces[-1].key

    def kept(how: Any, per_prompt: int = 2, seed: int = 0) -> set[tuple[str, int]]:
        verdicts = choose(Select(per_prompt=per_prompt, order=how), traces, seed=seed)
        assert verdicts.keys() == {trace.key for trace in traces}
        return {key for key, verdict in verdicts.items() if verdict.keep}

    def numbers(keys: set[tuple[str, int]]) -> set[int]:
        return {sample for prompt, sample in keys if prompt != other[0]}

    assert numbers(kept("first")) == {0, 1}
    assert numbers(kept("shortest")) == {1, 3}
    assert numbers(kept("shortest", per_prompt=1)) == {1}  # of two equally long ones the first
    draws = {frozenset(numbers(kept("random", seed=seed))) for seed in range(50)}
    assert len(draws) == 6, "every pair of four comes up"
    assert kept("random", per_prompt=2, seed=3) < kept("random", per_prompt=3, seed=3)
    assert all(other in kept(how) for how in ("first", "shortest", "random"))
    assert [Filter(select=Select(per_prompt=1, order=how)).draws for how in ("first", "random")] == [False, True]


def test_a_ledger_row_holds_all_of_it() -> None:
    judged = Judged.of(make_trace(tokens=9), [Verdict("format", False, "no_think", {"think": 0})], {"dedup": [1, "a"]})
    row = json.loads(json.dumps(judged.to_row()))
    assert Judged.from_row(row) == judged
    assert Judged.from_row(row | {"spelling": "ab"}) is None, "of an earlier version: the trace is judged again"


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
    summary = run_filter(
        tmp_path / "run", MIXED, length={"max_tokens": 64}, select={"per_prompt": 1, "order": "shortest"}
    )
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
    steps = [(step.filter, step.entered, step.dropped, step.kept) for step in summary.funnel]
    assert steps == [
        ("format", 7, 2, 5),
        ("finish", 5, 0, 5),
        ("correct", 5, 1, 4),
        ("length", 4, 1, 3),
        ("dedup", 3, 1, 2),
        ("select", 2, 1, 1),
    ]
    assert summary.funnel[0].reasons == {"not_closed": 1, "no_think": 1}
    assert summary.verdicts["length"] == {"ok": 5, "too_long": 2}
    figures = ("total", "kept", "dropped", "prompts", "prompts_kept", "tokens_kept", "unit")
    assert [getattr(summary, figure) for figure in figures] == [7, 1, 6, 1, 1, 30, "teacher tokens"]
    share = round(30 * len("20 + 22 = 42") / len(GOOD))
    assert (summary.reasoning_median, summary.reasoning_mean) == (share, share)
    shown = capsys.readouterr().out
    assert "unverifiable:" not in shown, "no trace was dropped for it"
    assert "kept 1 of 7 traces" in shown and str(tmp_path / "run/filtered/kept") in shown


def test_every_filter_can_be_turned_off(tmp_path: Path) -> None:
    summary = run_filter(tmp_path / "run", MIXED, format=False, finish=False, correct=False, dedup=False)
    assert (summary.kept, summary.funnel, summary.verdicts) == (7, (), {})
    summary = run_filter(tmp_path / "run", fresh=True, format=False, finish=False, correct=True, dedup=False)
    assert summary.verdicts == {"correct": {"correct": 5, "wrong": 1, "unverifiable: no answer found": 1}}


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
    assert run_filter(run, MIXED[3:]).total == 7
    assert graded == [trace.response for trace in MIXED[3:]]
    keys = [tuple(row["key"]) for row in Ledger(run / "filtered/verdicts.jsonl").rows()]
    assert sorted(keys) == sorted(trace.key for trace in MIXED)


def test_a_trace_whose_text_changed_is_judged_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_filter(run, MIXED[:3]).kept == 1
    for path in (run / "traces").iterdir():
        path.unlink()
    changed = make_trace(GOOD + " Yes.", sample=2)
    assert run_filter(run, [MIXED[0], changed]).kept == 2
    assert samples(run).keys() == {0, 2}


def test_other_settings_are_refused_but_not_other_means(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_filter(run, MIXED, correct={"workers": 1})
    run_filter(run, correct={"workers": 3})
    with pytest.raises(UserError, match=r"length: false → true, length.min_tokens: not set → 10"):
        run_filter(run, length={"min_tokens": 10})


def test_nothing_to_filter_and_nothing_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no traces to filter; run `distill generate` first"):
        run_filter(tmp_path / "empty")
    assert not (tmp_path / "empty" / "filtered").exists()
    with pytest.raises(UserError) as nothing:
        run_filter(tmp_path / "run", [MIXED[2], MIXED[3], make_trace(WRONG, question="more?")])
    message = str(nothing.value)
    assert message.startswith("nothing kept of 3 traces: correct dropped 2, 2 of them as 'wrong'")
    assert message.endswith("turn off that filter: `--set filter.correct=false --fresh filter`")
    assert "\n" not in message
    assert samples(tmp_path / "run", "dropped").keys() == {0, 2, 3}, "they can be read"


def test_prompts_without_gold_answers_are_refused_before_any_work() -> None:
    without = [{"kind": "file", "path": "problems.jsonl", "answer": None}]
    with pytest.raises(
        UserError, match=r"^filter.correct: prompts.0 has no gold answers .* set filter.correct to false"
    ):
        check_gradable(make_recipe(prompts=without))
    check_gradable(make_recipe(prompts=without, correct=False))


def test_imported_traces_are_measured_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run_filter(tmp_path / "run", [make_trace(sample=0, tokens=30), make_trace(GOOD + " Yes.", sample=1)])
    assert (summary.unit, summary.tokens_kept) == ("words", 11 + 12)
    shown = " ".join(capsys.readouterr().out.split())
    assert "23 words, median reasoning 2 words" in shown and "token" not in shown


def test_traces_without_reasoning_are_measured_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_filter(tmp_path / "run", [make_trace("The sum is \\boxed{42}.", tokens=30)], format=False)
    assert "30 teacher tokens, 30 a trace, most without a think block" in " ".join(capsys.readouterr().out.split())


def test_traces_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To be judged; they are written by copying columns. A finished stage decodes none."""
    passes: list[str] = []
    monkeypatch.setattr(store_module, "decoded", lambda path, traces: passes.append(path.name) or traces)
    with Run(tmp_path / "run", make_recipe()) as run:
        add(tmp_path / "run", MIXED)
        TraceStore(tmp_path / "run" / "traces").compact()
        passes.clear()
        STAGE.perform(run)
        assert passes == ["traces"]
        STAGE.perform(run)
        assert passes == ["traces"]


class Shouting(TraceFilter):
    """One file: its settings, verdict, reasons and examples."""

    most: int = 3

    name = "shouting"
    reasons: ClassVar[Mapping[str, str]] = {OK: "few capitals", "shouting": "more than `most`"}
    examples = (Example(OK, "Yes"), Example("shouting", "YES", {"most": 2}))

    def judge(self, candidate: Candidate) -> Verdict:
        capitals = sum(letter.isupper() for letter in candidate.trace.response)
        return self.verdict("shouting" if capitals > self.most else OK, capitals=capitals)


class Extended(Filter):
    shouting: Switch[Shouting] = Shouting()  # one line of the table


def test_a_filter_is_a_class_and_a_line_in_the_table(tmp_path: Path) -> None:
    loud = make_trace(GOOD + " YES, SURE.", sample=1, tokens=30)
    table = Extended.model_validate_json('{"dedup": false}', strict=True)
    summary = run_filter(tmp_path / "run", [make_trace(tokens=30), loud], table=table)
    assert [(step.filter, step.dropped) for step in summary.funnel][-1] == ("shouting", 1)
    assert summary.verdicts["shouting"] == {"ok": 1, "shouting": 1}
    assert samples(tmp_path / "run", "dropped")[1]["shouting"] == "shouting"
    strict = Extended.model_validate_json('{"dedup": false, "shouting": {"most": 2}}', strict=True)
    with pytest.raises(UserError, match=r"shouting.most: 3 → 2"):
        run_filter(tmp_path / "run", table=strict)
    off = Extended.model_validate_json('{"dedup": false, "shouting": false}', strict=True)
    assert run_filter(tmp_path / "run", fresh=True, table=off).kept == 2


def test_a_task_without_a_grader_is_refused_before_any_work(tmp_path: Path) -> None:
    chat = [{"kind": "file", "path": "problems.jsonl", "task": "chat"}]
    with pytest.raises(UserError, match=r"^filter.correct: task 'chat' .* set it to false"):
        run_filter(tmp_path / "run", MIXED, prompts=chat)
    assert not (tmp_path / "run" / "filtered").exists()
    check_gradable(make_recipe(prompts=chat, correct=False))


def test_hostile_text_goes_through(tmp_path: Path) -> None:
    """Lone surrogates, null bytes and line separators in a trace come out as they went in."""
    odd = "<think>\ud800 \x00 \u2028</think>\\boxed{42}\udfff"
    run_filter(tmp_path / "run", [make_trace(odd, tokens=3)])
    assert [trace.text for trace, _ in read_traces(tmp_path / "run/filtered/kept")] == [odd]
