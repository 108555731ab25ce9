"""A server's reply to a chat request, checked before anything of it is stored.

A server is not trusted to send what its protocol says: any field may have another type. What cannot be an answer is
`Unreadable`, and the caller asks again; a count that cannot be right (`"seven"`, -1, 10^30) is treated as unknown,
because the answer beside it is complete. Nothing is guessed: an unknown finish reason is kept as it is, so that it
never counts as "stop".
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from distill.chat import END_THINK, THINK

GAVE_UP = "insufficient_system_resource"  # DeepSeek's finish reason for an answer that it did not complete
MOST_TOKENS = 2**31 - 1  # that a trace can store
LONGEST_REASON = 64  # characters of a finish reason


class Unreadable(Exception):
    """A reply that holds no answer. The message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Reply:
    """One answer. text: with reasoning that the server returns separately put back into `<think>`. finish_reason,
    prompt_tokens, completion_tokens: None where the server does not say, or nothing that can be right."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


def read_reply(body: bytes) -> Reply:
    """The first choice of a chat completion. Errors: Unreadable."""
    reply = as_object(read_json(body), "the reply")
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Unreadable("it has no choices")
    choice = as_object(choices[0], "a choice")
    return reply_of(as_object(choice.get("message"), "a message"), choice.get("finish_reason"), reply.get("usage"))


def reply_of(message: Mapping[str, object], finish: object, usage: object) -> Reply:
    """The answer in a message. finish, usage: the values that a server sent beside it. Errors: Unreadable."""
    finish_reason = _finish_reason(finish)
    content = _text(message.get("content"), "content")
    reasoning = _text(message.get("reasoning_content"), "reasoning_content")
    reasoning = reasoning or _text(message.get("reasoning"), "reasoning")
    counts = usage if isinstance(usage, dict) else {}
    tokens = _count(counts.get("completion_tokens"))
    if not (content or reasoning or tokens):
        raise Unreadable("it is empty")
    return Reply(_joined(reasoning, content), finish_reason, _count(counts.get("prompt_tokens")), tokens)


def read_model_names(body: bytes) -> list[str]:
    """The names in a list of models. Errors: Unreadable."""
    data = as_object(read_json(body), "the reply").get("data")
    if not isinstance(data, list):
        raise Unreadable("it lists no models")
    names = [as_object(item, "a model").get("id") for item in data]
    if not all(isinstance(name, str) and name for name in names):
        raise Unreadable("a model has no name")
    return [str(name) for name in names]


def read_json(body: bytes) -> object:
    """The value that a body holds. Errors: Unreadable."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Unreadable("it is empty" if not body.strip() else "it is not JSON") from None


def as_object(value: object, name: str) -> dict[str, object]:
    """A JSON object. Errors: Unreadable, which calls it `name`."""
    if not isinstance(value, dict):
        raise Unreadable(f"{name} is not an object")
    return value


def joined_parts(value: object, name: str) -> str:
    """A text, the texts of a list of parts, or "" for null. Errors: Unreadable, which calls it `name`."""
    if isinstance(value, list):
        parts = [as_object(part, f"a part of {name}") for part in value]
        if any(part.get("type") != "text" for part in parts):
            raise Unreadable(f"{name} has a part that is no text")
        value = "".join(joined_parts(part.get("text"), name) for part in parts)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unreadable(f"{name} is not text")
    return value


def _text(value: object, name: str) -> str:
    """As `joined_parts`; halves of a surrogate pair are joined, and replaced where one is alone: JSON can spell it,
    UTF-8 cannot store it."""
    return joined_parts(value, name).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _finish_reason(value: object) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > LONGEST_REASON or not value.isprintable():
        raise Unreadable("finish_reason is not a short text")
    if value == GAVE_UP:
        raise Unreadable("the server gave up")
    return value


def _count(value: object) -> int | None:
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS
    return value if usable and isinstance(value, int) else None


def _joined(reasoning: str, content: str) -> str:
    """The text with both tags: a template may have opened the reasoning in the prompt, and a reasoning parser may have
    taken the tags away."""
    if not reasoning:
        head, closed, _ = content.partition(END_THINK)
        return f"{THINK}\n{content}" if closed and THINK not in head else content
    closed = f"\n</think>\n\n{content}" if content else ""
    return f"{THINK}\n{reasoning.strip()}{closed}"
