"""Rows of published traces in every layout, and reading them, for the tests of published traces."""

import json

from pydantic import TypeAdapter

from distill.recipe.sources import TraceSource
from distill.traces.published import read_published

THOUGHT = "<think>\nI add.\n</think>\n\nFour."


def reading(tmp_path, rows, notes=None, **fields):
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TypeAdapter(TraceSource).validate_python({"kind": "file", "path": str(path)} | fields)
    return read_published(source, [].append if notes is None else notes.append)


def read(tmp_path, rows, notes=None, **fields):
    return list(reading(tmp_path, rows, notes, **fields))


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
    "sharegpt with roles": {
        "conversations": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": THOUGHT}]
    },
    "reasoning": {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "Four.", "reasoning": "I add."},
        ]
    },
    "thinking": {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "Four.", "thinking": "I add."},
        ]
    },
    "reasoning in both places": {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": THOUGHT, "reasoning": "I add."},
        ]
    },
    "messages as JSON text": {
        "messages": json.dumps([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": THOUGHT}])
    },
    "conversations as JSON text": {
        "conversations": json.dumps([{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": THOUGHT}])
    },
    "prompt and completion as JSON text": {
        "prompt": json.dumps([{"role": "user", "content": "2+2?"}]),
        "completion": json.dumps([{"role": "assistant", "content": THOUGHT}]),
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": THOUGHT}]},
        ]
    },
    "a part of thinking": {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "I add."}]},
                    {"type": "text", "text": "Four."},
                ],
            },
        ]
    },
    "generations as JSON text": {"problem": "2+2?", "generations": json.dumps([THOUGHT])},
    "prompt and completion": {"prompt": "2+2?", "completion": THOUGHT},
    "prompt and completion as messages": {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "completion": [{"role": "assistant", "content": THOUGHT}],
    },
    "a column of reasoning beside messages": {
        "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four."}],
        "reasoning": "I add.",
    },
    "a column of reasoning beside turns": {
        "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "Four."}],
        "thinking": "I add.",
    },
    "a column of reasoning beside a completion": {
        "prompt": "2+2?",
        "completion": "Four.",
        "reasoning_content": "I add.",
    },
    "question, reasoning, response": {"question": "2+2?", "reasoning": "I add.", "response": "Four."},
    "problem, thinking, response": {"problem": "2+2?", "thinking": ["I add."], "response": "Four."},
    "instruction, reasoning_trace, response": {"instruction": "2+2?", "reasoning_trace": "I add.", "response": "Four."},
    "medical o1": {"Question": "2+2?", "Complex_CoT": "I add.", "Response": "Four."},
    "a list of reasonings": {"problem": "2+2?", "generations": ["Four."], "reasonings": ["I add."]},
    "a list of reasonings as JSON text": {"problem": "2+2?", "generations": '["Four."]', "reasoning": '["I add."]'},
    "one reasoning": {"problem": "2+2?", "generations": ["Four."], "reasoning": "I add."},
    "a column beside a reasoning": {"prompt": "2+2?", "completion": THOUGHT, "reasoning": "Something else."},
    "a column beside an empty block": {
        "prompt": "2+2?",
        "completion": "<think>\n\n</think>\n\nFour.",
        "reasoning": "I add.",
    },
    "a mode beside a reasoning": {"prompt": "2+2?", "completion": THOUGHT, "reasoning": "on", "thinking": True},
    "both spellings": {
        "messages": [
            {"role": None, "content": None, "from": "human", "value": "2+2?"},
            {"role": "assistant", "content": THOUGHT, "from": None, "value": None},
        ]
    },
}
