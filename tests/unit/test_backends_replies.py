"""Any reply of a server is stored as it is, or ends in one line."""

import copy
import random
from pathlib import Path

import pytest
from server_support import JSON, KEY, PARAMS, Answer, body, chat, opened, server

from distill.backends import Job
from distill.backends.backend import Completed
from distill.backends.collect import collect
from distill.backends.reply import reply_of
from distill.errors import UserError, WorkError
from distill.prompts import Prompt
from distill.traces.store import TraceStore


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without long pauses."""
    monkeypatch.setattr("distill.backends.remote.RETRIES", 1)
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


VALUES: tuple[object, ...] = (
    None, True, 0, -1, 10**30, 2**63, 1.5, float("nan"), "", "x", "seven", "\ud800", "\0", "stop", [], [None], [[]], {},
    {"a": 1}, "y" * 10_000, ["text"], [{"type": "text", "text": "4"}],
)  # fmt: skip


def mutated(rng: random.Random) -> Answer:
    """A reply with one thing wrong: a value, a key, its bytes, its status or its type."""
    reply = chat()
    for _ in range(rng.randint(1, 3)):
        _replace_one(reply, rng)
    content = body(reply)
    kind = rng.randrange(6)
    if kind == 0:
        content = content[: rng.randrange(len(content))]
    elif kind == 1:
        at = rng.randrange(len(content))
        content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    status = rng.choice((200, 200, 200, 200, 201, 204, 400, 401, 429, 500, 503)) if kind == 2 else 200
    return status, rng.choice((JSON, JSON, "text/html", "", "application/octet-stream")), content


def _replace_one(tree: object, rng: random.Random) -> None:
    """Replace or delete one value somewhere in a JSON tree."""
    while True:
        keys: list[object] = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if tree else []  # type: ignore[arg-type]
        if not keys:
            return
        key = rng.choice(keys)
        inner = tree[key]  # type: ignore[index]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            tree = inner
            continue
        if isinstance(tree, dict) and rng.random() < 0.2:
            del tree[key]
        else:
            tree[key] = copy.deepcopy(rng.choice(VALUES))  # type: ignore[index]
        return


def survives(seed: int, directory: Path) -> str:
    """One answer of a server that sends a mutated reply: stored, a user's error, or a failure, each in one line."""
    answer = mutated(random.Random(seed))
    store = TraceStore(directory / str(seed))
    job = Job(Prompt.from_question("2 + 2?", "4"), (0,))
    with server(lambda *_: answer) as made:
        try:
            with opened(made) as backend, store:
                collect(backend, store, [job], PARAMS, 0, "t", lambda count: None)
        except (UserError, WorkError) as error:
            assert "\n" not in str(error) and KEY not in str(error)
            return type(error).__name__
    store.compact()
    (trace,) = TraceStore(directory / str(seed))
    assert trace.finish_reason != "stop" or b'"stop"' in answer[2]
    return "stored"


def test_any_reply_is_stored_or_one_line(tmp_path: Path) -> None:
    assert {survives(seed, tmp_path) for seed in range(20)} >= {"stored", "WorkError"}


@pytest.mark.slow
def test_two_hundred_replies(tmp_path: Path) -> None:
    outcomes = [survives(seed, tmp_path) for seed in range(1000, 1200)]
    assert outcomes.count("stored") > 20 and outcomes.count("WorkError") > 20 and "UserError" in outcomes


def test_two_fields_stay_apart_where_the_answer_mentions_a_tag() -> None:
    message = {"reasoning_content": "Think of tags.", "content": "A block ends with `</think>`, as in HTML."}
    reply = reply_of(message, "stop", None)
    assert reply.parts == (message["reasoning_content"], message["content"])
    done = Completed(Prompt.from_question("q", None), 0, reply.text, "stop", parts=reply.parts)
    assert done.split == reply.parts
    whole = reply_of({"reasoning_content": "r", "content": "<think>r</think>answer"}, "stop", None)
    assert whole.parts is None  # the content has the reasoning too
