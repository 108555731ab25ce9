"""Servers that answer in part, in other places or never, and secrets in a recipe."""

import json
import os
from pathlib import Path

import pytest
import yaml
from server_support import chat
from typer.testing import CliRunner

from distill.backends.asking import Asking
from distill.backends.reply import Tokens, counts_of, read_reply
from distill.backends.secrets import checked_url
from distill.catalog import load_recipe
from distill.cli import app
from distill.errors import UserError
from distill.models import Server
from distill.recipe import Price
from distill.recipe.server import TeacherServer

SENT = ("max_tokens", "temperature", "top_p", "seed", "n")  # names in a request


def test_token_ids_of_some_parts_are_not_those_of_the_answer() -> None:
    tokens = Tokens()
    tokens.add({}, {"delta": {"content": "a"}, "token_ids": [1]})
    assert tokens.known() == ((1,), None, None)
    assert tokens.known(2) == ((), None, None)
    tokens.add({}, {"delta": {"content": "b"}})
    assert tokens.known() == ((), None, None)


def test_log_probabilities_of_some_parts_are_not_those_of_the_answer() -> None:
    tokens = Tokens()
    entry = {"token": "token_id:1", "logprob": -0.5, "top_logprobs": []}
    tokens.add({}, {"delta": {"content": "a"}, "token_ids": [1], "logprobs": {"content": [entry]}})
    assert tokens.known()[1] == (-0.5,)
    tokens.add({}, {"delta": {"content": "b"}, "token_ids": [2]})
    assert tokens.known() == ((1, 2), None, None)


def test_a_refused_text_refuses_no_parameter() -> None:
    asking = Asking(Server("http://h/v1", "m"), "")
    for text in (
        "Content not allowed: 'The temperature of a gas …'",
        "Input not permitted: The temperature of a gas is unknown to most",
        "unknown role 'robot' in {'messages': [], 'temperature': 0.6, 'top_p': 0.95}",
        "Extra inputs are not permitted: 'min_p'. " + "x" * 99 + " 'temperature'",
        "the seed of an apple",
        "can't: n/a is not supported",
    ):
        assert not asking.adapt(SENT, 400, text), text
    assert not asking.adapt(SENT, 400, "unsupported value; temperature", param="messages")
    assert not asking.adapt(SENT, 400, "temperature must be at most 2", param="temperature", code="invalid_value")
    assert asking.left_out == ()
    assert asking.adapt(SENT, 400, "only the default is allowed", param="temperature", code="unsupported_value")
    assert asking.adapt(SENT, 422, "model m does not support top_p") and asking.left_out == ("temperature", "top_p")


@pytest.mark.parametrize(
    ("text", "left_out"),
    [
        ("Unknown parameter: 'top_k'. Allowed: 'temperature', 'top_p', 'seed'", "top_k"),
        ("Unsupported parameter `top_k`. Supported parameters: `temperature`, `top_p`", "top_k"),
        ("property 'top_k' is unsupported, did you mean 'top_p'?", "top_k"),
        ("Unsupported parameter: 'top_p'. Use 'temperature' instead.", "top_p"),
        ("got 'temperature' and 'top_p', but 'top_k' is unknown", "top_k"),
        ("temperature: supported values are 1", "temperature"),
        ("'temperature' does not support 0.6 with this model. Only the default (1) value is supported.", "temperature"),
        ("parameters that are not supported: 'top_p'", "top_p"),
        ("Unknown parameter: 'min_p'. Supported parameters are 'temperature' and 'seed'", None),
    ],
)
def test_the_refused_parameter_is_the_nearest_one_and_none_that_is_advised(text: str, left_out: str | None) -> None:
    asking = Asking(Server("http://h/v1", "m"), "")
    assert asking.adapt([*SENT, "top_k"], 400, text) is (left_out is not None)
    assert asking.left_out == ((left_out,) if left_out else ())


def test_a_request_that_was_under_way_when_its_parameter_was_refused_is_sent_again() -> None:
    asking = Asking(Server("http://h/v1", "m"), "")
    for _ in range(3):
        assert asking.adapt(SENT, 400, "unknown field `seed`")
    assert not asking.adapt([*SENT[1:]], 400, "unknown field `max_completion_tokens`")
    assert not asking.adapt([name for name in SENT if name != "seed"], 400, "unknown field `seed`")


def test_no_parameter_that_decides_the_samples_is_left_out_after_an_answer() -> None:
    asking = Asking(Server("http://h/v1", "m"), "")
    asking.answered()
    assert not asking.adapt(SENT, 400, "unknown field `temperature`") and asking.left_out == ()
    assert asking.adapt(SENT, 400, "unknown field `seed`") and asking.left_out == ("seed",)


def test_more_cached_tokens_than_prompt_tokens_cost_no_less_than_the_cache() -> None:
    price = Price(input=2, output=0, cached_input=1, date="2025-01-20", source="x")
    assert price.cost(1_000_000, 0, 9_000_000) == 1.0


@pytest.mark.parametrize("url", ["http://h/v1?api_key=s3cret", "http://h/v1#x"])
def test_an_address_with_a_query_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="query") as caught:
        checked_url(url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"url": "http://user:PASS@h/v1"},
        {"url": ["http://h/v1", "http://user:PASS@h/v1"]},
        {"headers": {"X": "Bearer sk-PASS"}},
        {"headers": {"X-Api-Key": "PASS"}},
    ],
)
def test_a_recipe_holds_no_secret(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="environment variable"):
        TeacherServer.model_validate({"url": "http://h/v1", "model": "m"} | values)


def test_a_key_in_place_of_its_variable_is_not_shown() -> None:
    result = CliRunner().invoke(app, ["serve", "tiny-r1", "--api-key-env", "sk-THE-KEY"])
    assert isinstance(result.exception, UserError)
    assert "sk-THE-KEY" not in str(result.exception) + result.output


# ---- headers


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"X-Team": "étude"}, "X-Team: the value holds a line end or a character outside ASCII"),
        ({"X-Team": "a\nX-Other: b"}, "X-Team: the value holds a line end"),
        ({"X Team": "a"}, "'X Team' is not the name of a header"),
        ({"X-Tëam": "a"}, "is not the name of a header"),
    ],
)
def test_a_header_that_http_cannot_carry_is_refused(headers: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherServer.model_validate({"url": "http://h/v1", "model": "m", "headers": headers})
    recipe = {
        "name": "r",
        "teacher": "deepseek-r1",
        "student": "tiny-qwen",
        "eval": {"benchmarks": ["tiny-arithmetic"]},
    }
    recipe |= {"prompts": [{"kind": "file", "path": "x.jsonl"}]}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe | {"server": {"url": "http://h/v1", "model": "m", "headers": headers}}))
    with pytest.raises(UserError, match=r"server\.headers") as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["s3cret-é", "s3cret\nX-Other: b", "s3cret\0"])
def test_a_header_of_the_environment_is_checked_when_it_is_read(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"GATEWAY": value})
    card = TeacherServer(url="http://h/v1", model="m", headers={"X-Key": "$GATEWAY"})
    with pytest.raises(
        UserError, match=r"server\.headers: X-Key: the value holds .*\(environment variable GATEWAY\)"
    ) as e:
        Server.of(card, None)
    assert "s3cret" not in str(e.value)


def test_white_space_around_a_header_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY", "tok-1\n")
    card = TeacherServer(url="http://h/v1", model="m", headers={"X-Key": "$GATEWAY", "X-Team": " a\n"})
    assert Server.of(card, None).headers == {"X-Key": "tok-1", "X-Team": "a"}


# ---- counts


@pytest.mark.parametrize(("count", "whole"), [(2, True), (None, True), (3, False), (1, False)])
def test_tokens_that_are_not_as_many_as_the_server_counts_are_none(count: int | None, whole: bool) -> None:
    content = [{"token_id": n, "logprob": -0.5, "top_logprobs": []} for n in (5, 7)]
    reply = chat(logprobs={"content": content}, token_ids=[5, 7]) | {"usage": {"completion_tokens": count}}
    read = read_reply(json.dumps(reply).encode())
    expected = ((5, 7), (-0.5, -0.5)) if whole else ((), None)
    assert (read.completion_token_ids, read.logprobs) == expected and read.completion_tokens == count


@pytest.mark.parametrize(
    ("usage", "completion"),
    [
        ({"completion_tokens": 9, "total_tokens": 135, "reasoning_tokens": 94}, 103),  # xAI: beside the completion's
        ({"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 94}}, 103),
        ({"completion_tokens": 103, "total_tokens": 135, "reasoning_tokens": 94}, 103),  # among them, as OpenAI counts
        ({"completion_tokens": 103, "total_tokens": 40}, 103),
        ({"completion_tokens": 9, "total_tokens": "135"}, 9),
        ({"total_tokens": 135, "reasoning_tokens": 94}, None),
    ],
)
def test_tokens_of_reasoning_are_among_those_of_the_completion(
    usage: dict[str, object], completion: int | None
) -> None:
    usage = {"prompt_tokens": 32} | usage
    assert read_reply(json.dumps(chat() | {"usage": usage}).encode()).completion_tokens == completion
    assert counts_of(usage) == (32, completion)


def test_more_cached_tokens_than_prompt_tokens_are_unknown() -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 11}}
    reply = read_reply(json.dumps(chat() | {"usage": usage}).encode())
    assert (reply.prompt_tokens, reply.cached_tokens) == (10, None)
