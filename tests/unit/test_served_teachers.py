"""Teachers behind a server only, what a server is sent for a mode of thinking, and whether it keeps to it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from server_support import JSON, body, chat, complete, server

from distill import backends, catalog
from distill.backends import SamplingParams
from distill.backends.answers import check_answer
from distill.backends.reply import read_reply
from distill.errors import UserError
from distill.models import Model, Server, in_mode
from distill.recipe import LocalEngine, TeacherServer
from distill.serve.requests import BadRequest, parse_chat, template_mode


@pytest.mark.parametrize("name", ["deepseek-v4-pro", "kimi-k3", "glm-5.3"])
def test_teachers_with_a_server_only_say_so_in_one_line(name):
    assert catalog.load_teacher(name).server is not None
    with pytest.raises(
        UserError, match=r"names a server and no weights, so .*vLLM, SGLang, llama.cpp, an API"
    ) as caught:
        catalog.resolve_weights("teacher", name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("thinking", "sent"),
    [
        (False, {"thinking": False, "enable_thinking": False}),
        ("high", {"thinking": True, "enable_thinking": True, "reasoning_effort": "high"}),
        ("max", {"thinking": True, "enable_thinking": True, "reasoning_effort": "max"}),
    ],
)
def test_what_a_server_is_sent_for_a_mode(thinking, sent):
    assert in_mode({}, thinking) == {"chat_template_kwargs": sent}
    own = {"chat_template_kwargs": {"reasoning_effort": "low"}}
    assert in_mode(own, thinking)["chat_template_kwargs"] == sent | {"reasoning_effort": "low"}


@pytest.mark.parametrize("thinking", [False, True, "high", "max"])
def test_our_server_reads_every_mode_that_our_client_sends(thinking):
    messages = [{"role": "user", "content": "Hello"}]
    assert template_mode(parse_chat(body({"messages": messages} | in_mode({}, thinking)))) == thinking
    with pytest.raises(BadRequest, match=r"chat_template_kwargs\.reasoning_effort: .*'high' or 'max'"):
        parse_chat(body({"messages": messages, "chat_template_kwargs": {"reasoning_effort": "low"}}))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("deepseek-v4-pro", {"thinking": {"type": "enabled"}, "reasoning_effort": "high"}),
        ("glm-5.3", {"thinking": {"type": "enabled"}}),
    ],
)
def test_a_card_names_the_mode_in_the_fields_of_its_api_and_for_other_servers(name, fields, monkeypatch):
    card = catalog.load_teacher(name)
    monkeypatch.setenv(card.server.api_key_env, "a key")
    assert Server.of(card.server, card.thinking).extra_body.items() >= fields.items()
    other = TeacherServer(url="http://localhost:8000/v1", model="m")
    assert Server.of(other, card.thinking).extra_body == in_mode({}, card.thinking)


# ---- what comes back


def at(place: Server, made) -> Server:
    return replace(place, url=f"http://127.0.0.1:{made.server_address[1]}/v1")


@pytest.mark.parametrize(
    ("message", "tokens", "thought"),
    [
        ({"content": None, "reasoning_content": "on and on"}, 480, 480),
        ({"content": "<think>on and on"}, 480, 480),
        ({"content": "So it is 4.", "reasoning_content": "on and on"}, 480, 469),  # 11 bytes are at most 11 tokens
        ({"content": "x" * 320, "reasoning_content": "on and on"}, 480, None),
        ({"content": "x" * 480}, 480, None),
    ],
)
def test_a_thinking_budget_is_checked_where_reasoning_is_not_counted(message, tokens, thought):
    params = SamplingParams(max_new_tokens=500, thinking_budget=100)
    usage = {"prompt_tokens": 3, "completion_tokens": tokens}
    reply = read_reply(body(chat(message=message, finish_reason="length") | {"usage": usage}))
    if thought is None:
        check_answer("x", reply, params)
        return
    with pytest.raises(UserError, match=f"ignores thinking_budget: {thought} tokens of reasoning instead of 100"):
        check_answer("x", reply, params)


@pytest.mark.parametrize("form", [{"reasoning_content": "r", "content": "4"}, {"content": "<think>r"}])
def test_a_server_that_ignores_thinking_false_is_noticed_by_its_first_answer(form):
    card = TeacherServer(url="http://x/v1", model="m")
    place = Server.of(card, False)
    answers = iter([chat(message=form)])
    with server(lambda *_: (200, JSON, body(next(answers, chat(message={"content": "4"}))))) as made:
        with (
            backends.open(Model("m", at(place, made)), LocalEngine(), 1) as backend,
            pytest.raises(UserError, match=r"ignores thinking: false .*; set server\.extra_body to the server's own"),
        ):
            complete(backend)
        answers = iter([chat(message={"content": "<think>\n\n</think>\n\n4"}), chat(message=form)])
        with backends.open(Model("m", at(place, made)), LocalEngine(), 1) as backend:
            assert len(complete(backend, 3)) == 3  # an empty block is none, and later answers are the model's
        answers = iter([chat(message=form)])
        with backends.open(Model("m", at(Server.of(card, True), made)), LocalEngine(), 1) as backend:
            assert len(complete(backend)) == 1


@pytest.mark.parametrize(
    ("objective", "server", "logprobs", "message"),
    [
        ({"kind": "on_policy"}, "url", None, None),  # `prompt_logprobs` of the student's own text: nothing is generated
        ({"kind": "on_policy", "student_share": 0.5}, "url", None, "set generate.logprobs"),
        ({"kind": "logits"}, "url", None, "set generate.logprobs"),
        ({"kind": "logits"}, "launch", 4, None),
        ({"kind": "on_policy"}, "launch", 4, r"kind on_policy asks tiny-r1 for .*\(server\.launch\).*remove `server`"),
        (
            {"kind": "on_policy", "teachers": {"math": "mine.yaml"}},
            None,
            None,
            r"asks mine\.yaml for .*remove `server`",
        ),
        ({"kind": "grpo"}, "launch", None, None),
    ],
)
def test_a_served_teacher_gives_what_the_objective_reads(objective, server, logprobs, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = (catalog.folder("teacher") / "tiny-r1" / "card.yaml").read_text()
    weights = f"weights: {catalog.resolve_weights('teacher', 'tiny-r1')}"
    Path("mine.yaml").write_text(re.sub("weights: .*", weights, card) + "\nserver: {launch: vllm}\n")
    servers = {"url": {"url": "http://127.0.0.1:8000/v1", "model": "m"}, "launch": {"launch": "vllm"}, None: None}
    settings = {"train.objective": objective, "server": servers[server], "generate.logprobs": logprobs}
    asked = catalog.load_recipe("tiny", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    if message is None:
        catalog.check_recipe(asked)
        return
    with pytest.raises(UserError, match=message):
        catalog.check_recipe(asked)
