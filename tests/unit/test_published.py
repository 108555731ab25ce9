"""Other people's traces: every layout by hand, real records of three projects, and one line for what cannot be read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_support import LAYOUTS, THOUGHT, read, reading
from pydantic import TypeAdapter

from distill.errors import UserError
from distill.recipe.sources import FileTraces, TraceSource
from distill.traces import published
from distill.traces.layouts import Columns, answers
from distill.traces.published import read_published
from distill.traces.tags import LeftOut


def test_the_last_of_several_turns_is_the_answer(tmp_path):
    turns = LAYOUTS["messages"]["messages"]
    (trace,) = read(tmp_path, [{"messages": [*turns, {"role": "user", "content": "Sure?"}, turns[1]]}])
    assert [m["role"] for m in trace.prompt.messages] == ["user", "assistant", "user"] and trace.text == THOUGHT


def test_generations_are_samples_of_one_prompt(tmp_path):
    row = {
        "problem": "2+2?",
        "answer": "4",
        "generations": [THOUGHT, "<think>\nHm", THOUGHT],
        "finish_reasons": ["stop", "length", None],
        "is_reasoning_complete": [True, False, True],
        "correctness_math_verify": [True, False, True],
    }
    traces = read(tmp_path, [row])
    assert [trace.sample for trace in traces] == [0, 1, 2] and len({trace.prompt.id for trace in traces}) == 1
    assert [trace.finish_reason for trace in traces] == ["stop", "length", "stop"]
    assert traces[1].reasoning is None


def test_without_finish_reasons_completeness_says_it(tmp_path):
    row = {"problem": "q", "generations": ["a", "b"], "finish_reasons": None, "is_reasoning_complete": [True, False]}
    assert [trace.finish_reason for trace in read(tmp_path, [row])] == ["stop", "length"]


def test_columns_of_ones_own_are_named(tmp_path):
    row = {"question": "2+2?", "trajectory": ["I add."], "attempt": "Four.", "solution": "4"}
    columns = {"question": "question", "reasoning": "trajectory", "response": "attempt", "answer": "solution"}
    (trace,) = read(tmp_path, [row], **columns)
    assert (trace.text, trace.prompt.answer) == (THOUGHT, "4")


def test_the_same_question_again_is_another_sample(tmp_path):
    assert [t.sample for t in read(tmp_path, [LAYOUTS["messages"], LAYOUTS["sharegpt"], LAYOUTS["messages"]])] == [
        0,
        1,
        2,
    ]


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "x"}, r"line 1: no known layout of traces .* in the columns text; name them: `question`"),
        ({"messages": "user: hi"}, "line 1: column messages is a str; it must be a list of turns, or such a list"),
        ({"messages": '["user: hi"]'}, "column messages is a str; it must be a list of turns"),
        ({"messages": ["user: hi", "assistant: ho"]}, r"messages\[0\] is a str, not a turn"),
        ({"messages": [USER, {"role": "poet", "content": "a"}]}, "unknown role 'poet'; expected one of human, user"),
        ({"messages": [USER, {"role": ["a"], "content": "a"}]}, r"unknown role \['a'\]"),
        ({"messages": [USER, ANSWER], "finish_reason": 3}, "the finish reason is 3, not text"),
        ({"generations": ["a"]}, "no column question; the columns are generations"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, [row])
    assert "\n" not in str(caught.value) and "traces.jsonl" in str(caught.value)


LEFT_OUT = {
    "no answer at the end": {"messages": [USER]},
    "no question before the answer": {"messages": [ANSWER]},
    "turns of tools": {"messages": [USER, {"role": "tool", "content": "4"}, ANSWER]},
    "empty answer": {"prompt": "q", "completion": "  "},
    "empty question": {"messages": [{"role": "user", "content": ""}, ANSWER]},
    "question of type int": {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "a"}]},
    "question of type image_url": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
    "answer of type tool_use": {"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use"}]}]},
    "reasoning of type dict": {"messages": [USER, ANSWER | {"reasoning": {"a": 1}}]},
    "two reasonings": {"messages": [USER, {"role": "assistant", "content": "<think>b</think>a", "thinking": "c"}]},
    "unknown tag <inner_thoughts>": {"prompt": "q", "completion": "<inner_thoughts>b</inner_thoughts>a"},
    "not text alone": {"messages": [USER, ANSWER], "images": ["a.png"]},
}


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_an_answer_that_cannot_be_used_is_left_out_and_counted(tmp_path, reason):
    notes = []
    rows = [LAYOUTS["messages"], LEFT_OUT[reason], LEFT_OUT[reason], LAYOUTS["sharegpt"]]
    assert len(read(tmp_path, rows, notes)) == 2
    file = f"{tmp_path.name}/traces.jsonl"
    assert notes == [f"note: {file}: 2 of 4 answers are left out: {reason} (2, first: {tmp_path}/traces.jsonl, line 2)"]
    with pytest.raises(UserError, match=rf"no answer can be used: {reason} \(1, "):
        read(tmp_path, [LEFT_OUT[reason]])


def test_a_null_among_generations_is_left_out(tmp_path):
    notes = []
    row = {"problem": "2+2?", "generations": [THOUGHT, None, THOUGHT], "finish_reasons": ["stop", None, "length"]}
    assert [t.finish_reason for t in read(tmp_path, [row], notes)] == ["stop", "length"]
    assert "1 of 3 answers are left out: empty answer (1, " in notes[0]


# ---- gold answers


@pytest.mark.parametrize(
    ("columns", "gold"),
    [
        ({"answer": 4}, "4"),
        ({"answer": "4"}, "4"),
        ({"answer": ["4"]}, "4"),
        ({"answer": ["4", "5"]}, None),
        ({"answer": float("nan")}, None),
        ({"answer": " "}, None),
        ({"reward_model": {"ground_truth": "4"}}, "4"),
        ({}, None),
    ],
)
def test_gold_answers(tmp_path, columns, gold):
    assert read(tmp_path, [LAYOUTS["messages"] | columns])[0].prompt.answer == gold


def test_an_answer_column_that_no_row_has_is_refused_before_anything_is_read(tmp_path):
    rows = [LAYOUTS["messages"] | {"gold": 4}] * 3
    taken = []
    with pytest.raises(UserError, match="no column solution; the columns are messages, gold: name the column"):
        for trace in reading(tmp_path, rows, answer="solution"):
            taken.append(trace)
    assert not taken
    notes = []
    assert [t.prompt.answer for t in read(tmp_path, [rows[0], LAYOUTS["sharegpt"]], notes, answer="gold")] == [
        "4",
        None,
    ]
    assert notes == [f"note: {tmp_path.name}/traces.jsonl: 1 of 2 answers have no gold answer"]


def test_a_parquet_file_is_read_by_the_columns_that_matter(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [LAYOUTS["messages"] | {"answer": 4, "input_ids": [1, 2]}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    (trace,) = read_published(FileTraces(kind="file", path=str(path)))
    assert (trace.text, trace.prompt.answer) == (THOUGHT, "4")
    for fields, message in (
        ({"answer": "gold"}, "no column gold; the columns are .*: name the column with the gold answer"),
        ({"response": "attempt"}, "no column attempt; the columns are messages, answer, input_ids"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_published(FileTraces(kind="file", path=str(path), **fields)))
    pq.write_table(pa.Table.from_pylist([{"text": "x"}]), path)
    with pytest.raises(UserError, match="no known layout of traces .* in the columns text; name them: `question`"):
        list(read_published(FileTraces(kind="file", path=str(path))))


def test_no_rows(tmp_path):
    with pytest.raises(UserError, match=r"traces\.jsonl: no rows"):
        read(tmp_path, [])


def test_another_run_without_kept_traces(tmp_path):
    with pytest.raises(UserError, match="no run directory with kept traces"):
        list(read_published(TypeAdapter(TraceSource).validate_python({"kind": "run", "path": str(tmp_path)})))


def test_real_teacher_records(real_data, tmp_path):
    """Ten of two generators, whose reasoning and answer are columns of their own."""
    rows = [
        row
        for name in ("openrouter", "ollama")
        for row in json.loads(real_data(f"teacher_records_rasbt/sample_{name}_outputs.json").read_text())
    ]
    columns = {"question": "problem", "reasoning": "message_thinking", "response": "message_content"}
    traces = read(tmp_path, rows, **columns)
    assert len(traces) == 10
    for row, trace in zip(rows, traces, strict=True):
        assert trace.reasoning == row["message_thinking"].strip() and trace.response == row["message_content"].strip()
        assert trace.prompt.answer == str(row["gtruth_answer"])


def test_real_thoughts_with_other_tags(real_data, tmp_path):
    rows = json.loads(real_data("marco_o1_longcot/CoT_demo.json").read_text())
    traces = read(tmp_path, rows, question="instruction", response="response")
    assert len(traces) == 125
    tagged = [trace for trace, row in zip(traces, rows, strict=True) if "<Thought>" in row["response"]]
    assert len(tagged) > 100 and all(trace.reasoning and "<Output>" not in trace.response for trace in tagged)


# ---- the cases that once failed

CASES = {  # file → (question, gold, reasoning, response) of each trace, or what is said
    "conv_rolecontent.jsonl": [("What is 2 + 3?", "5", "2 + 3 = 5", "\\boxed{5}")],
    "conversations_str.jsonl": [("What is 2 + 3?", "5", "2 + 3 = 5", "\\boxed{5}")],
    "generations_null.jsonl": [("What is 2 + 3?", "5", "2 + 3 = 5", "\\boxed{5}")],
    "im_end_inside.jsonl": [
        ("What is 2 + 3?", "5", "the template ends turns with <|im_end|> I recall. 2 + 3 = 5", "\\boxed{5}")
    ],
    "kimi_tags.jsonl": [("What is 2 + 3?", "5", "2+3=5", "\\boxed{5}")],
    "magistral_tags.jsonl": [("What is 2 + 3?", "5", "2+3=5", "\\boxed{5}")],
    "messages_bad_elem.jsonl": r"messages\[0\] is a str, not a turn",
    "messages_str.jsonl": [("What is 2 + 3?", "5", "2 + 3 = 5", "\\boxed{5}")],
    "multi_turn.jsonl": [("And 5 + 1?", "6", "5+1=6", "\\boxed{6}")],
    "nested_gold.jsonl": [("What is 2 + 3?", "5", "2 + 3 = 5", "\\boxed{5}")],
    "one_empty.jsonl": [
        ("What is 2 + 3?", "5", "2 + 3 = 5", "\\boxed{5}"),
        ("What is 4 + 4?", "8", "2 + 3 = 5", "\\boxed{5}"),
    ],
    "parts.jsonl": [("What is 2 + 3?", None, "2 + 3 = 5", "\\boxed{5}")],
    "reasoning_key.jsonl": [("What is 2 + 3?", "5", "2 + 3 = 5", "\\boxed{5}")],
    "tool_last.jsonl": r"no answer can be used: turns of tools \(1",
}


@pytest.mark.parametrize("name", CASES)
def test_the_cases(cases, name):
    source = FileTraces(kind="file", path=str(cases(f"layouts/{name}")))
    if isinstance(CASES[name], str):
        with pytest.raises(UserError, match=CASES[name]):
            list(read_published(source))
    else:
        traces = list(read_published(source, [].append))
        assert [(t.prompt.messages[-1]["content"], t.prompt.answer, t.reasoning, t.response) for t in traces] == CASES[
            name
        ]


def test_every_case_is_tried(cases):
    assert {path.name for path in cases("layouts").iterdir()} == CASES.keys()


def test_a_reasoning_of_its_own_stays_apart_from_an_answer_that_mentions_a_tag():
    row = {"messages": [USER, {"role": "assistant", "content": "It ends with </think>.", "thinking": "Tags."}]}
    (answer,) = answers(row, Columns(), "row 0")
    assert answer.parts == ("Tags.", "It ends with </think>.")


def test_a_field_that_begins_like_the_answer_is_not_the_reasoning_in_it():
    row = {"messages": [USER, {"role": "assistant", "content": "The 4th tag </think> ends it.", "thinking": "4"}]}
    (answer,) = answers(row, Columns(), "row 0")
    assert answer.parts == ("4", "The 4th tag </think> ends it.")


def test_an_empty_completion_is_left_out():
    (reason,) = answers({"prompt": "q", "completion": []}, Columns(), "row 0")
    assert isinstance(reason, LeftOut) and str(reason) == "no answer at the end"


@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_gold_column_outside_ascii(tmp_path, ascii_only):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"question": "q", "答案": "4"}, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    assert published._mentions(path, "答案") and not published._mentions(path, "答")
