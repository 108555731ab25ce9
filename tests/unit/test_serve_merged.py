"""Answers to several prompts come together, and end together."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.chat import Chat
from distill.serve.answers import Answers, merged
from distill.serve.requests import BadRequest, ChatMessage, CompletionRequest


class Sources:
    """`each(name, count)`: a source of (name, 0), (name, 1)…, which waits before every item."""

    def __init__(self):
        self.closed = []

    async def each(self, name, count, error=None):
        try:
            for number in range(count):
                await asyncio.sleep(0)
                yield name, number
            if error:
                raise error
        finally:
            self.closed.append(name)


async def taken(sources, most=100):
    items = []
    async with aclosing(merged(sources)) as source:
        async for item in source:
            items.append(item)
            if len(items) == most:
                break
    return items


def test_all_items_come_in_turns_and_in_the_order_of_their_source():
    made = Sources()
    items = asyncio.run(taken([made.each("a", 5), made.each("b", 5), made.each("c", 0)]))
    assert sorted(items) == [(name, number) for name in "ab" for number in range(5)]
    for name in "ab":
        assert [number for of, number in items if of == name] == list(range(5))
    assert {name for name, _ in items[:4]} == {"a", "b"}, "no source waits for the end of another"
    assert sorted(made.closed) == ["a", "b", "c"]


def test_an_error_or_an_early_end_closes_all_sources():
    made = Sources()
    with pytest.raises(ValueError, match="of b"):
        asyncio.run(taken([made.each("a", 50), made.each("b", 2, ValueError("of b"))]))
    assert sorted(made.closed) == ["a", "b"]
    made = Sources()
    assert len(asyncio.run(taken([made.each("a", 50), made.each("b", 50)], most=3))) == 3
    assert sorted(made.closed) == ["a", "b"]


def test_the_choices_of_all_prompts_are_bounded():
    assert len(CompletionRequest(prompt=["a"] * 1024, n=2).prompts) == 1024
    with pytest.raises(BadRequest, match="2,048 choices of a request at most"):
        _ = CompletionRequest(prompt=["a"] * 1025, n=2).prompts


def test_a_repeated_prompt_has_draws_of_its_own_unless_the_request_has_a_seed():
    chat = Chat.load(Path(__file__).resolve().parents[2] / "teachers" / "tiny-r1")
    model = SimpleNamespace(thinking=None)
    answers = Answers(SimpleNamespace(chat=chat, model=model, max_context=100, vocab_size=1 << 20), "m")
    for seed, different in ((None, 3), (7, 1)):
        asked = answers.prepare(CompletionRequest(prompt=["Once"] * 3, seed=seed)).asked
        assert len({(each.seed, each.prompt_key, each.samples) for each in asked}) == different


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_an_answer_that_is_sent_back_has_its_reasoning_before_the_content(field):
    message = ChatMessage.model_validate({"role": "assistant", "content": "4", field: "2 + 2", "tool_calls": []})
    assert message.to_message() == {"role": "assistant", "content": "<think>\n2 + 2\n</think>\n\n4"}
    assert ChatMessage.model_validate({"role": "assistant", "content": "4", field: None}).content == "4"
    with pytest.raises(ValueError, match="reasoning of a message is text, and the assistant's"):
        ChatMessage.model_validate({"role": "user", "content": "4", field: "2 + 2"})
