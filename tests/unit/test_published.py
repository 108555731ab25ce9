"""Other people's traces: every layout by hand, real records of three projects, and one line for what cannot be read."""

import json

import pytest
from pydantic import TypeAdapter

from distill.errors import UserError
from distill.generate import STAGE
from distill.recipe import Recipe
from distill.recipe.sources import TraceSource
from distill.run import Run
from distill.traces.published import read_published
from distill.traces.store import TraceStore

THOUGHT = "<think>\nI add.\n</think>\n\nFour."


def read(tmp_path, rows, **fields):
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_published(TypeAdapter(TraceSource).validate_python({"kind": "file", "path": str(path)} | fields)))


LAYOUTS = {
    "messages": {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": THOUGHT}]},
    "reasoning_content": {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "Four.", "reasoning_content": "I add."},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": THOUGHT}]},
    "openthoughts": {
        "system": "",
        "conversations": [
            {"from": "user", "value": "2+2?"},
            {
                "from": "assistant",
                "value": "<|begin_of_thought|>\nI add.\n<|end_of_thought|>\n\n"
                "<|begin_of_solution|>Four.<|end_of_solution|>",
            },
        ],
    },
    "prompt and completion": {"prompt": "2+2?", "completion": THOUGHT},
    "prompt and completion as messages": {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "completion": [{"role": "assistant", "content": THOUGHT}],
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_recognised_by_its_columns(tmp_path, layout):
    (trace,) = read(tmp_path, [LAYOUTS[layout] | {"answer": 4}])
    assert trace.prompt.messages == ({"role": "user", "content": "2+2?"},)
    assert (trace.text, trace.reasoning, trace.response) == (THOUGHT, "I add.", "Four.")
    assert (trace.prompt.answer, trace.sample, trace.finish_reason) == ("4", 0, "stop")


def test_a_system_prompt_stays_before_the_question(tmp_path):
    row = LAYOUTS["sharegpt"] | {"system": "Think."}
    assert [m["role"] for m in read(tmp_path, [row])[0].prompt.messages] == ["system", "user"]


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


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "x"}, r"line 1: no layout of traces that is known .* in the columns text: name `question`"),
        ({"messages": [{"role": "user", "content": "q"}]}, "does not end with an answer"),
        ({"messages": [{"role": "tool", "content": "q"}]}, "a turn of 'tool', who is none of human, user"),
        ({"prompt": "q", "completion": "  "}, "an answer that is str; remove the row|is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no question before the answer"),
        ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "a"}]}, "a question that is int"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, [row])
    assert "\n" not in str(caught.value) and "traces.jsonl" in str(caught.value)


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


# ---- as a stage


def recipe_of(path, **traces):
    return Recipe.model_validate(
        {
            "name": "published",
            "teacher": "deepseek-r1",
            "student": "tiny-qwen",
            "traces": [{"kind": "file", "path": str(path)} | traces],
            "eval": {"benchmarks": ["tiny-arithmetic"]},
        }
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "published.jsonl"
    rows = [
        {"prompt": f"{i}+1?", "completion": f"<think>\nx\n</think>\n\n{i + 1}", "answer": i + 1} for i in range(600)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_first_stage_takes_published_traces_and_is_finished(file, tmp_path):
    with Run(tmp_path / "run", recipe_of(file)) as run:
        summary = STAGE.perform(run)
        assert (summary.traces, summary.prompts, summary.made) == (600, 600, 600)
        assert STAGE.is_finished(run) and STAGE.perform(run) == summary
    assert len(TraceStore(tmp_path / "run" / "traces")) == 600


def test_a_larger_limit_takes_the_rest_and_other_columns_are_refused(file, tmp_path):
    with Run(tmp_path / "run", recipe_of(file, limit=100)) as run:
        assert STAGE.perform(run).made == 100
    with Run(tmp_path / "run", recipe_of(file)) as run:
        assert STAGE.perform(run).made == 500
    with (
        Run(tmp_path / "run", recipe_of(file, answer="gold")) as run,
        pytest.raises(UserError, match=r"traces\.0\.answer"),
    ):
        STAGE.perform(run)


def test_a_source_that_cannot_be_read_leaves_nothing(tmp_path):
    with (
        Run(tmp_path / "run", recipe_of(tmp_path / "nowhere.jsonl")) as run,
        pytest.raises(UserError, match="no such file"),
    ):
        STAGE.perform(run)
    assert not (tmp_path / "run" / "traces").exists()


def test_prompts_and_traces_are_one_or_the_other(file):
    fields = recipe_of(file).model_dump()
    with pytest.raises(ValueError, match="one of `prompts` .* and `traces`"):
        Recipe.model_validate(fields | {"prompts": [{"kind": "procedural", "name": "arithmetic"}]})
    with pytest.raises(ValueError, match="one of `prompts` .* and `traces`"):
        Recipe.model_validate(fields | {"traces": []})
