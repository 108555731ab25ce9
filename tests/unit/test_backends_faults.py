"""Servers that answer in part, in other places or never, and secrets in a recipe."""

import pytest
from typer.testing import CliRunner

from distill.backends.asking import Asking
from distill.backends.reply import Tokens
from distill.backends.secrets import checked_url
from distill.cli import app
from distill.errors import UserError
from distill.models import Server
from distill.recipe import Price
from distill.recipe.server import TeacherServer


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
    assert not asking.adapt("max_tokens", 400, "Content not allowed: 'The temperature of a gas …'")
    assert not asking.adapt("max_tokens", 400, "unsupported value; temperature", param="messages")
    assert asking.adapt("max_tokens", 400, "unsupported value", param="temperature")


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
