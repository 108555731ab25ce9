"""What differs from server to server: parameters, token ids, forms of reasoning, several addresses, headers."""

import json
from pathlib import Path

import pytest
from server_support import JSON, KEY, PARAMS, Answer, Handler, body, chat, complete, opened, server

from distill import backends
from distill.backends import Job, SamplingParams
from distill.backends.asking import Asking
from distill.backends.reply import read_reply
from distill.backends.stream import Stream
from distill.errors import UserError, WorkError
from distill.models import Model, Server, teacher_of
from distill.prompts import Prompt
from distill.recipe import LocalEngine, SamplingSettings, TeacherServer


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.backends.remote.RETRIES", 2)
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def owned(by: str) -> Answer:
    return 200, JSON, body({"object": "list", "data": [{"id": "m", "owned_by": by}]})


def url(made) -> str:
    return f"http://127.0.0.1:{made.server_address[1]}/v1"


# ---- parameters


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("temperature", "Unsupported value: 'temperature' does not support 0.6 with this model."),
        ("top_p", "Unsupported parameter: 'top_p' is not supported with this model."),
        ("seed", "unknown field `seed`"),
        ("top_k", "[{'loc': ('body', 'top_k'), 'msg': 'Extra inputs are not permitted'}]"),
        ("stream_options", "Unrecognized request argument supplied: stream_options"),
    ],
)
def test_a_refused_parameter_is_left_out_from_then_on_and_said_once(name, message, capsys):
    def reply(number: int, handler: Handler) -> Answer:
        if name in handler.server.asked[number]:
            return 400, JSON, body({"error": {"message": message, "type": "invalid_request_error"}})
        return 200, JSON, body(chat())

    params = SamplingParams(temperature=0.6, top_k=5, max_new_tokens=64)
    with server(reply) as made, opened(made, 1) as backend:
        jobs = [Job(Prompt.from_question("2 + 2?", "4"), tuple(range(4)))]
        assert len(list(backend.complete(jobs, params, 0))) == 4
    assert [name in asked for asked in made.asked] == [True] + [False] * 4
    assert capsys.readouterr().out.count(f"refuses {name}") == 1


def test_a_field_of_the_recipe_is_not_left_out():
    """It is what was asked for, so the refusal is the user's to see."""
    refusal = 400, JSON, body({"error": {"message": "unknown field `seed`"}})
    with server(lambda *_: refusal) as made:
        place = Server(url(made), "m", extra_body={"seed": 5})
        with backends.open(Model("m", place), LocalEngine(), 1) as backend, pytest.raises(UserError, match="seed"):
            complete(backend)


def test_a_refusal_of_the_content_is_not_one_of_a_parameter():
    with server(
        lambda *_: (400, JSON, body({"error": {"message": "the temperature of the text is too high"}}))
    ) as made:
        with opened(made) as backend, pytest.raises(UserError, match="temperature of the text"):
            complete(backend)
        assert len(made.asked) == 1


# ---- token ids and probabilities


def test_vllm_is_asked_for_ids_and_its_spelling_of_them_is_read():
    tokens = [("token_id:5", -0.5, [("token_id:5", -0.5), ("token_id:9", -1.25)]), ("token_id:7", 0.0, [])]
    content = [
        {"token": t, "logprob": p, "top_logprobs": [{"token": a, "logprob": q} for a, q in tops]}
        for t, p, tops in tokens
    ]
    made_reply = chat(logprobs={"content": content}, token_ids=[5, 7]) | {"prompt_token_ids": [1, 2, 3]}
    made_reply |= {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    params = SamplingParams(max_new_tokens=8, logprobs=2)
    with server(lambda *_: (200, JSON, body(made_reply)), owned("vllm")) as made, opened(made) as backend:
        (done,) = backend.complete([Job(Prompt.from_question("2 + 2?", "4"), (0,))], params, 0)
    (asked,) = made.asked
    assert asked["return_token_ids"] and asked["return_tokens_as_token_ids"] and "prompt_key" not in asked
    assert (asked["logprobs"], asked["top_logprobs"]) == (True, 2)
    assert (done.prompt_token_ids, done.completion_token_ids) == ((1, 2, 3), (5, 7))
    assert (done.logprobs, done.top_logprobs) == ((-0.5, 0.0), (((5, -0.5), (9, -1.25)), ()))


def test_a_server_that_gives_no_ids_cannot_serve_probabilities():
    content = [{"token": "a", "logprob": -0.5, "top_logprobs": []}]
    with (
        server(lambda *_: (200, JSON, body(chat(logprobs={"content": content})))) as made,
        opened(made) as backend,
        pytest.raises(UserError, match=r"no log-probabilities with token ids; set generate\.logprobs to null"),
    ):
        jobs = [Job(Prompt.from_question("2 + 2?", "4"), (0,))]
        list(backend.complete(jobs, SamplingParams(max_new_tokens=8, logprobs=2), 0))


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        5,
        {"content": 5},
        {"content": [5]},
        {"content": [{"token_id": -1, "logprob": 0.0}]},
        {"content": [{"token_id": 10**12, "logprob": 0.0}]},
        {"content": [{"token_id": 1, "logprob": "x"}]},
        {"content": [{"token_id": True, "logprob": 0.0}]},
        {"content": [{"token": "token_id:x", "logprob": 0.0}]},
        {"content": [{"token_id": 1, "logprob": 0.0, "top_logprobs": [{"token": "b"}]}]},
        {"content": [{"token_id": 1, "logprob": 0.0}, {"token": "b", "logprob": 0.0}]},
    ],
)
def test_probabilities_that_are_not_whole_are_none(logprobs):
    reply = read_reply(body(chat(logprobs=logprobs)))
    assert (reply.completion_token_ids, reply.logprobs, reply.top_logprobs) == ((), None, None)


def test_probabilities_that_contradict_the_ids_are_none():
    made = chat(logprobs={"content": [{"token_id": 1, "logprob": 0.0}]}, token_ids=[2])
    reply = read_reply(body(made | {"usage": {"completion_tokens": 1}}))
    assert (reply.completion_token_ids, reply.logprobs) == ((2,), None)


def test_ids_and_probabilities_of_a_stream_are_put_together():
    stream = Stream()
    for n in range(3):
        choice = {
            "delta": {"content": f"{n}"},
            "token_ids": [n],
            "logprobs": {"content": [{"token_id": n, "logprob": -float(n), "top_logprobs": []}]},
            "finish_reason": "stop" if n == 2 else None,
        }
        stream.feed(b"data: " + body({"choices": [choice], "prompt_token_ids": [9] if n == 0 else None}) + b"\n\n")
    reply = stream.reply()
    assert (reply.text, reply.completion_token_ids, reply.logprobs) == ("012", (0, 1, 2), (0.0, -1.0, -2.0))
    assert reply.prompt_token_ids == (9,)


# ---- usage and forms


@pytest.mark.parametrize(
    ("usage", "cached", "reasoning"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 5}}, 2, 5),
        ({"prompt_cache_hit_tokens": 1}, 1, None),
        ({"reasoning_tokens": 4}, None, 4),
        ({"prompt_tokens_details": None, "completion_tokens_details": "x"}, None, None),
    ],
)
def test_usage_in_its_forms(usage, cached, reasoning):
    reply = read_reply(body(chat() | {"usage": {"prompt_tokens": 3, "completion_tokens": 7} | usage}))
    assert (reply.prompt_tokens, reply.completion_tokens) == (3, 7)
    assert (reply.cached_tokens, reply.reasoning_tokens) == (cached, reasoning)


@pytest.mark.parametrize(
    ("message", "finish", "form", "text"),
    [
        ({"content": "4", "reasoning_content": "2+2"}, "stop", "reasoning_content", "<think>\n2+2\n</think>\n\n4"),
        (
            {"content": "\n\n4", "reasoning_content": "2+2\n"},
            "stop",
            "reasoning_content",
            "<think>\n2+2\n</think>\n\n4",
        ),
        ({"content": "4", "reasoning": "2+2"}, "stop", "reasoning", "<think>\n2+2\n</think>\n\n4"),
        ({"content": "<think>2+2</think>4"}, "stop", "think", "<think>2+2</think>4"),
        ({"content": "2+2</think>4"}, "stop", "end_think", "<think>\n2+2</think>4"),
        ({"content": "4"}, "stop", "none", "4"),
        ({"content": "<think>2+"}, "length", "cut_off", "<think>2+"),
        ({"content": None, "reasoning_content": "2+"}, "length", "cut_off", "<think>\n2+"),
        ({"content": "", "reasoning_content": "it is 4"}, "stop", "no_content", "<think>\nit is 4"),
        ({"content": "<think>it is 4</think>"}, "stop", "no_content", "<think>it is 4</think>"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_each_form_of_reasoning_is_stored_as_what_it_is(message, finish, form, text, streamed):
    if streamed:
        stream = Stream()
        for name, value in message.items():
            for character in value or "":
                stream.feed(b"data: " + body({"choices": [{"delta": {name: character}}]}) + b"\n\n")
        stream.feed(b"data: " + body({"choices": [{"delta": {}, "finish_reason": finish}]}) + b"\n\ndata: [DONE]\n\n")
        reply = stream.reply()
    else:
        reply = read_reply(body(chat(message=message, finish_reason=finish)))
    assert (reply.form, reply.text) == (form, text)


# ---- addresses and headers


def test_several_servers_share_the_work_and_one_that_fails_is_avoided():
    answer, broken = (200, JSON, body(chat())), (500, JSON, b"{}")
    with server(lambda *_: answer) as first, server(lambda *_: answer) as second, server(lambda *_: broken) as third:
        place = Server(url(first), "m", others=(url(second), url(third)))
        with backends.open(Model("m", place), LocalEngine(), 4) as backend:
            done = complete(backend, 60)
            assert backend.identity == {"model": "m"}
    assert len(done) == 60 == len(first.asked) + len(second.asked)
    assert min(len(first.asked), len(second.asked)) > 15 and 0 < len(third.asked) < 20


def test_when_all_servers_fail_the_work_fails():
    with server(lambda *_: (500, JSON, b"{}")) as first, server(lambda *_: (500, JSON, b"{}")) as second:
        place = Server(url(first), "m", others=(url(second),))
        with backends.open(Model("m", place), LocalEngine(), 2) as backend, pytest.raises(WorkError):
            complete(backend, 20)
    assert len(first.asked) + len(second.asked) < 40


def test_each_address_must_have_the_model():
    with server(lambda *_: (404, JSON, b"{}")) as first, server(lambda *_: (404, JSON, b"{}")) as second:
        second.models = 200, JSON, body({"data": [{"id": "other"}]})
        with pytest.raises(UserError, match=f"{second.server_address[1]}/v1: the server has no model 'm'"):
            backends.open(Model("m", Server(url(first), "m", others=(url(second),))), LocalEngine()).__enter__()


def test_an_address_that_does_not_answer_is_left_out_and_said(capsys):
    with server(lambda *_: (200, JSON, body(chat()))) as made:
        place = Server("http://127.0.0.1:9/v1", "m", others=(url(made),))
        with backends.open(Model("m", place), LocalEngine(), 2) as backend:
            assert len(complete(backend, 3)) == 3
    out = capsys.readouterr().out
    assert "http://127.0.0.1:9/v1: no model server answers there" in out and "the other servers are asked" in out
    dead = Server("http://127.0.0.1:9/v1", "m", others=("http://127.0.0.1:10/v1",))
    with pytest.raises(UserError, match="127.0.0.1:9/v1: no model server answers there"):
        backends.open(Model("m", dead), LocalEngine()).__enter__()


def test_an_address_without_its_path_is_completed_by_the_message():
    with server(lambda *_: (404, JSON, b"{}"), (404, JSON, b"{}")) as made:
        for path, message in (("", "complete the address, which usually ends with /v1"), ("/v1", "has no model 'm'")):
            place = Server(url(made).removesuffix("/v1") + path, "m")
            with pytest.raises(UserError, match=message):
                backends.open(Model("m", place), LocalEngine()).__enter__()


def test_headers_are_sent_and_their_secrets_are_hidden(monkeypatch):
    monkeypatch.setenv("GATEWAY_TOKEN", "tok-0123456789")
    seen = []

    def reply(number: int, handler: Handler) -> Answer:
        seen.append((handler.headers["X-Gateway"], handler.headers["X-Team"]))
        return 400, JSON, body({"error": {"message": "tok-0123456789 is no token"}})

    with server(reply) as made:
        card = TeacherServer(url=(url(made),), model="m", headers={"X-Gateway": "$GATEWAY_TOKEN", "X-Team": "a"})
        place = teacher_of("teacher", "deepseek-r1", card).place
        assert "tok-" not in repr(place)
        with backends.open(Model("m", place), LocalEngine(), 1) as backend, pytest.raises(UserError) as error:
            complete(backend)
    assert set(seen) == {("tok-0123456789", "a")} and "tok-" not in str(error.value)


def test_a_header_whose_variable_is_not_set_is_refused():
    card = TeacherServer(url="http://x/v1", model="m", headers={"X-A": "$NOT_SET_ANYWHERE"})
    with pytest.raises(UserError, match=r"server\.headers: X-A: the environment variable NOT_SET_ANYWHERE"):
        teacher_of("teacher", "deepseek-r1", card)


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    """The host has no address: only through the proxy can it answer."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with server(lambda *_: (200, JSON, body(chat()))) as made:
        monkeypatch.setenv("HTTP_PROXY", url(made).removesuffix("/v1"))
        place = Server("http://teacher.invalid/v1", "m", KEY)
        with backends.open(Model("m", place), LocalEngine(), 1) as backend:
            assert complete(backend)[0].text.endswith("\\boxed{4}.")
    assert len(made.asked) == 1


def test_a_recipe_names_one_address_or_several(tmp_path: Path):
    for given, others in (("http://a/v1", ()), (["http://a/v1", "http://b/v1"], ("http://b/v1",))):
        card = TeacherServer.model_validate_json(json.dumps({"url": given, "model": "m"}))
        place = Server.of(card, None)
        assert (place.url, place.others) == ("http://a/v1", others)
    with pytest.raises(ValueError):
        TeacherServer(url=(), model="m")
    assert PARAMS.logprobs is None


# ---- thinking budgets


@pytest.mark.parametrize(
    ("owner", "fields"),
    [
        ("vllm", {"thinking_token_budget": 100}),
        ("sglang", {"custom_params": {"thinking_budget": 100}}),
        ("llamacpp", {"thinking_budget_tokens": 100}),
        ("distill", {"thinking_budget": 100}),
    ],
)
def test_a_thinking_budget_has_another_name_on_every_server(owner, fields):
    params = SamplingParams(max_new_tokens=500, thinking_budget=100)
    with server(lambda *_: (200, JSON, body(chat())), owned(owner)) as made, opened(made) as backend:
        backend.check([], params)
        list(backend.complete([Job(Prompt.from_question("2 + 2?", "4"), (0,))], params, 0))
    assert made.asked[0].items() >= fields.items()


def test_a_server_that_is_not_known_to_hold_a_thinking_budget_is_refused():
    params = SamplingParams(max_new_tokens=500, thinking_budget=100)
    with server(lambda *_: (200, JSON, body(chat())), owned("somebody")) as made, opened(made) as backend:
        with pytest.raises(UserError, match=r"has no known field for it \(owned_by 'somebody'"):
            backend.check([], params)
        assert not made.asked


def test_a_server_that_ignores_a_thinking_budget_is_noticed():
    params = SamplingParams(max_new_tokens=500, thinking_budget=100)
    usage = {"completion_tokens": 480, "completion_tokens_details": {"reasoning_tokens": 400}}
    with (
        server(lambda *_: (200, JSON, body(chat() | {"usage": usage})), owned("vllm")) as made,
        opened(made) as backend,
        pytest.raises(UserError, match="ignores thinking_budget: 400 tokens of reasoning instead of 100"),
    ):
        list(backend.complete([Job(Prompt.from_question("2 + 2?", "4"), (0,))], params, 0))


def test_a_run_without_a_budget_keeps_its_fingerprint():
    """Runs that were begun before the key existed go on."""
    assert "thinking_budget" not in SamplingSettings().settings()
    assert SamplingSettings(thinking_budget=5).settings()["thinking_budget"] == 5


# ---- several samples in one request


def several(count: int) -> dict[str, object]:
    choices = [chat(index=i, message={"content": f"answer {i}"})["choices"][0] for i in range(count)]
    return chat() | {"choices": choices}


def asking_n(made, stream: bool = False) -> Model:
    return Model("m", Server(url(made), "m", n=True, stream=stream))


@pytest.mark.parametrize("stream", [False, True])
def test_the_samples_of_a_prompt_are_one_request(stream):
    def reply(number: int, handler: Handler) -> Answer:
        n = handler.server.asked[number]["n"]
        if not stream:
            return 200, JSON, body(several(n))
        parts = [
            {"choices": [{"index": i, "delta": {"content": text}, "finish_reason": end}]}
            for text, end in (("answer", None), (" ", None), (None, "stop"))
            for i in range(n)
        ]
        parts += [{"choices": [{"index": 0, "delta": {}}], "usage": chat()["usage"]}]
        return 200, "text/event-stream", b"".join(b"data: " + body(part) + b"\n\n" for part in parts)

    with server(reply) as made, backends.open(asking_n(made, stream), LocalEngine(), 4) as backend:
        done = complete(backend, 5)
        assert backend.usage == backends.Usage(3, 7)
    assert [asked["n"] for asked in made.asked] == [5]
    assert {d.sample: d.text for d in done} == {i: "answer " if stream else f"answer {i}" for i in range(5)}
    assert all(d.prompt_tokens == 3 and d.completion_tokens is None for d in done)  # seven are of all five


def test_a_server_that_refuses_n_is_asked_for_one_sample_at_a_time(capsys):
    def reply(number: int, handler: Handler) -> Answer:
        if "n" in handler.server.asked[number]:
            return 400, JSON, body({"error": {"message": "Unsupported parameter: 'n'"}})
        return 200, JSON, body(chat())

    with server(reply) as made, backends.open(asking_n(made), LocalEngine(), 1) as backend:
        jobs = [Job(Prompt.from_question(f"{n}?", "4"), (0, 1, 2)) for n in range(2)]
        assert len(list(backend.complete(jobs, PARAMS, 0))) == 6
    assert "n" in made.asked[0] and capsys.readouterr().out.count("refuses n;") == 1
    assert len({asked["seed"] for asked in made.asked if "n" not in asked}) == 6


def test_choices_that_are_missing_or_empty_are_asked_for_alone_and_the_others_kept():
    def reply(number: int, handler: Handler) -> Answer:
        asked = handler.server.asked[number]
        if "n" not in asked:
            return 200, JSON, body(chat(message={"content": "alone"}))
        made = several(3)
        made["choices"][1]["message"] = {"content": ""}
        made["choices"] = made["choices"][:2]
        return 200, JSON, body(made | {"usage": None})

    with server(reply) as made, backends.open(asking_n(made), LocalEngine(), 1) as backend:
        assert [(d.sample, d.text) for d in complete(backend, 3)] == [(0, "answer 0"), (1, "alone"), (2, "alone")]
    assert len(made.asked) == 3


def test_a_sample_that_fails_does_not_lose_those_of_its_request():
    def reply(number: int, handler: Handler) -> Answer:
        return (200, JSON, body(several(2))) if "n" in handler.server.asked[number] else (400, JSON, b"{}")

    with server(reply) as made, backends.open(asking_n(made), LocalEngine(), 1) as backend:
        done = []
        with pytest.raises(UserError, match="refused the request"):
            for each in backend.complete([Job(Prompt.from_question("2 + 2?", "4"), (0, 1, 2))], PARAMS, 0):
                done.append(each)
    assert [d.sample for d in done] == [0, 1]


def test_samples_with_gaps_are_several_requests():
    asking = Server("http://x/v1", "m", n=True)
    assert Asking(asking, "").group((0, 1, 4, 6, 7, 8)) == [(0, 1), (4,), (6, 7, 8)]
    assert Asking(Server("http://x/v1", "m"), "").group((0, 1)) == [(0,), (1,)]
    assert [len(group) for group in Asking(asking, "").group(range(300))] == [128, 128, 44]
