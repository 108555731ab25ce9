"""Dividing an answer without think tags: where the response begins, and what is left alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.prompts.prompt import Prompt, split_reasoning
from distill.traces.trace import Trace
from distill.traces.wrapping import divided, wrapped


def make(text, **fields):
    reasoning, response = split_reasoning(text)
    return Trace(Prompt.from_question("q", "4"), 0, 0, text, reasoning, response, "stop", "t", **fields)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One.\n\nTwo.\n\nSo \\boxed{4}.", ("One.\n\nTwo.", "So \\boxed{4}.")),
        ("One.\n\nSo\n\\[\n\\boxed{4}\n\\]", ("One.", "So\n\\[\n\\boxed{4}\n\\]")),
        ("One.\n \t\nSo \\boxed{4}.\n\nChecked.", ("One.", "So \\boxed{4}.\n\nChecked.")),
        ("\\boxed{3}?\n\nNo: \\boxed{4}.", ("\\boxed{3}?", "No: \\boxed{4}.")),
        ("2 + 2 = 4\nSo \\boxed{4}.", ("2 + 2 = 4", "So \\boxed{4}.")),
        ("\n\n2 + 2 = 4\nSo \\boxed{4}.", ("2 + 2 = 4", "So \\boxed{4}.")),
        ("2 + 2 = \\boxed{4}", None),
        ("\n\n \\boxed{4}", None),
        ("One.\n\nfour", None),
        ("One.\n\nSo \\boxed{4", None),
        ("", None),
    ],
)
def test_the_response_begins_with_the_paragraph_of_the_last_box(text, parts):
    assert divided(text) == parts


@given(st.text(alphabet="ab \n\\boxed{}<>", max_size=60))
def test_nothing_is_lost_and_the_tags_are_read_back(text):
    if (parts := divided(text)) is not None:
        assert "".join("".join(parts).split()) == "".join(text.split())
        assert split_reasoning(f"<think>\n{parts[0]}\n</think>\n\n{parts[1]}") == parts


def test_a_trace_gets_a_block_and_loses_the_tokens_of_its_old_text():
    trace = wrapped(make("One.\n\nSo \\boxed{4}.", completion_token_ids=(1, 2), logprobs=(-1.0, -1.0)))
    assert trace.text == "<think>\nOne.\n</think>\n\nSo \\boxed{4}."
    assert (trace.reasoning, trace.response) == ("One.", "So \\boxed{4}.")
    assert (trace.completion_token_ids, trace.completion_tokens, trace.logprobs) == ((), None, None)


def test_a_trace_with_a_block_is_kept_and_a_broken_one_is_not_divided():
    whole = make("<think>a</think>\\boxed{4}")
    assert wrapped(whole) is whole
    assert wrapped(make("<think>One.\n\nSo \\boxed{4}.")) is None
