"""Layouts of published traces: the reasoning, the system prompt and the question are read wherever they stand."""

import pytest
from published_support import LAYOUTS, THOUGHT, read

from distill.errors import UserError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_recognised_by_its_columns(tmp_path, layout):
    (trace,) = read(tmp_path, [LAYOUTS[layout] | {"answer": 4}])
    assert trace.prompt.messages == ({"role": "user", "content": "2+2?"},)
    assert (trace.text, trace.reasoning, trace.response) == (THOUGHT, "I add.", "Four.")
    assert (trace.prompt.answer, trace.sample, trace.finish_reason) == ("4", 0, "stop")


@pytest.mark.parametrize(
    "text",
    [
        "◁think▷\nI add.\n◁/think▷\n\nFour.",
        "[THINK]\nI add.\n[/THINK]\n\nFour.",
        "<thinking>\nI add.\n</thinking>\n\n<answer>Four.</answer>",
        "<Thought>\nI add.\n</Thought>\n<Output>\nFour.\n</Output>",
        "<|begin_of_thought|>\nI add.\n<|end_of_thought|><|begin_of_solution|>\n\nFour.\n<|end_of_solution|>",
        "<thought>\nI add.\n</thought>\n\nFour.",
        "<reasoning>\nI add.\n</reasoning>\n<answer>Four.</answer>",
        "<seed:think>\nI add.\n</seed:think>\n\nFour.",
        "<THINK>\nI add.\n</THINK>\n\nFour.",
        "<s>[THINK]\nI add.\n[/THINK]\n\nFour.</s>",
        "\nI add.\n[/THINK]\n\nFour.",
        "\nI add.\n◁/think▷\n\nFour.",
        "<|START_THINKING|>\nI add.\n<|END_THINKING|><|START_RESPONSE|>Four.<|END_RESPONSE|>",
        "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>",
    ],
)
def test_other_tags_become_think_tags(tmp_path, text):
    (trace,) = read(tmp_path, [{"prompt": "2+2?", "completion": text}])
    assert (trace.reasoning, trace.response) == ("I add.", "Four.")
    assert trace.text.replace("<think>I", "<think>\nI") == THOUGHT


def test_a_sentence_before_the_tag_belongs_to_the_reasoning(tmp_path):
    (trace,) = read(tmp_path, [{"prompt": "2+2?", "completion": "Sure. [THINK]I add.[/THINK]Four."}])
    assert (trace.text, trace.reasoning) == ("<think>Sure. I add.</think>Four.", "Sure. I add.")


@pytest.mark.parametrize(
    "text",
    [
        "In Kimi it is ◁think▷ and ◁/think▷.",
        "<think>[THINK]</think>4",
        "see <Output>",
        "Kimi has ◁think▷ and ◁/think▷ as tags.",
        "It ends with [/THINK].",
        "<b>4</b>",
        "<thinking",
    ],
)
def test_tags_inside_a_text_stay(tmp_path, text):
    assert read(tmp_path, [{"prompt": "2+2?", "completion": text}])[0].text == text


def test_a_reasoning_that_is_cut_off_stays_open(tmp_path):
    (trace,) = read(tmp_path, [{"prompt": "2+2?", "completion": "[THINK]I ad", "finish_reason": "length"}])
    assert (trace.text, trace.reasoning, trace.finish_reason) == ("<think>I ad", None, "length")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({}, "stop"),
        ({"finish_reason": None}, None),
        ({"finish_reason": ""}, None),
        ({"finish_reason": "stop"}, "stop"),
        ({"finish_reason": "EOS"}, "stop"),
        ({"finish_reason": "end_turn"}, "stop"),
        ({"finish_reason": "max_tokens"}, "length"),
        ({"finish_reason": "content_filter"}, "content_filter"),
    ],
)
def test_finish_reasons(tmp_path, said, meant):
    assert read(tmp_path, [LAYOUTS["messages"] | said])[0].finish_reason == meant
    row = {"problem": "q", "generations": ["a"]} | {f"{key}s": [value] for key, value in said.items()}
    assert read(tmp_path, [row])[0].finish_reason == meant


def test_lists_about_the_answers_may_be_json_text(tmp_path):
    row = {"problem": "q", "generations": ["a", "b"]}
    for lists in ({"finish_reasons": '["stop", "length"]'}, {"is_reasoning_complete": "[true, false]"}):
        assert [trace.finish_reason for trace in read(tmp_path, [row | lists])] == ["stop", "length"]
    with pytest.raises(UserError, match="finish_reasons has length 1, and there are 2 generations"):
        read(tmp_path, [row | {"finish_reasons": '["stop"]'}])


@pytest.mark.parametrize(
    ("turn", "columns", "meant"),
    [
        ({"finish_reason": "length"}, {}, "length"),
        ({"finish_reason": None}, {}, "stop"),
        ({}, {"stop_reason": "max_tokens"}, "length"),
        ({}, {"stop_reason": "length"}, "length"),
        ({}, {"stop_reason": "\n\nQ:"}, "stop"),
        ({}, {"stop_reason": 7}, "stop"),
        ({}, {"stop_reason": "\n\nQ:", "finish_reason": "length"}, "length"),
        ({"finish_reason": "length"}, {"finish_reason": None}, "length"),
    ],
)
def test_finish_reasons_of_a_turn_and_of_other_servers(tmp_path, turn, columns, meant):
    row = {"messages": [USER, ANSWER | turn]} | columns
    assert read(tmp_path, [row])[0].finish_reason == meant


@pytest.mark.parametrize("column", ["system_prompt", "system_message"])
def test_other_names_of_a_system_prompt(tmp_path, column):
    for row in (LAYOUTS["messages"], LAYOUTS["sharegpt"], {"question": "2+2?", "response": THOUGHT}):
        (trace,) = read(tmp_path, [row | {column: "Think."}])
        assert [m["content"] for m in trace.prompt.messages] == ["Think.", "2+2?"]


@pytest.mark.parametrize("column", ["context", "input"])
def test_a_question_goes_on_in_another_column(tmp_path, column):
    row = {"instruction": "Add.", "response": THOUGHT}
    for said, asked in (("2, 2", "Add.\n\n2, 2"), ("", "Add."), (None, "Add.")):
        assert read(tmp_path, [row | {column: said}])[0].prompt.messages[-1]["content"] == asked
    (trace,) = read(tmp_path, [LAYOUTS["messages"] | {column: "2, 2"}])
    assert trace.prompt.messages[-1]["content"] == "2+2?", "a conversation is whole"


def test_a_system_prompt_stays_before_the_question(tmp_path):
    row = LAYOUTS["sharegpt"] | {"system": "Think."}
    assert [m["role"] for m in read(tmp_path, [row])[0].prompt.messages] == ["system", "user"]
    row = LAYOUTS["messages"] | {"system": "Think."}
    assert [m["role"] for m in read(tmp_path, [row])[0].prompt.messages] == ["system", "user"]
    row = {"messages": [{"role": "system", "content": "Own."}, *row["messages"]], "system": "Think."}
    assert [m["content"] for m in read(tmp_path, [row])[0].prompt.messages] == ["Own.", "2+2?"]


@pytest.mark.parametrize(
    ("text", "reasoning", "response"),
    [
        ("<think>I add.</think>Four, after </think>.", "I add.", "Four, after </think>."),
        ("[THINK]I add.[/THINK]Four, after [/THINK].", "I add.", "Four, after [/THINK]."),
        ("<Thought>I add.</Thought>\n<Output>\nFour: </Thought>.\n</Output>", "I add.", "Four: </Thought>."),
        ("◁think▷Is it </think>?◁/think▷Four, after </think>.", "Is it </think>?", "Four, after </think>."),
    ],
)
def test_the_first_closing_tag_ends_a_reasoning(tmp_path, text, reasoning, response):
    """Also after it was stored, where the text has think tags."""
    (trace,) = read(tmp_path, [{"messages": [USER, {"role": "assistant", "content": text}]}])
    assert (trace.reasoning, trace.response) == (reasoning, response)


def test_a_reasoning_that_is_of_no_certain_answer_leaves_them_out(tmp_path):
    row = {"problem": "2+2?", "generations": ["Four.", "Five."], "reasoning": "I add."}
    with pytest.raises(UserError, match=r"no answer can be used: reasoning of several answers \(2, "):
        read(tmp_path, [row])
    own = row | {"generations": [THOUGHT, THOUGHT]}
    assert [trace.reasoning for trace in read(tmp_path, [own])] == ["I add."] * 2


def test_a_column_of_reasoning_counts_beside_named_columns_too(tmp_path):
    row = {"q": "2+2?", "thinking": "Four.", "reasoning": "I add."}
    (trace,) = read(tmp_path, [row], question="q", response="thinking")
    assert (trace.reasoning, trace.response) == ("I add.", "Four.")
