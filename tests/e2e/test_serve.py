"""`distill serve` with the tiny teacher: what clients that are not ours get, and what `distill generate` gets."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx2
import openai
import pytest
import yaml
from serve_support import Serving, serving

from distill import backends
from distill.backends import Job, SamplingParams
from distill.backends.reply import Unreadable, reply_of
from distill.catalog import load_recipe
from distill.chat import split_reasoning
from distill.cli import main
from distill.models import Model, Server, teacher_of
from distill.prompts import Prompt, load_prompts
from distill.recipe import LocalEngine
from distill.traces.store import TraceStore

PROMPTS = [
    Prompt.from_question(prompt.messages[0]["content"], None, "chat")
    for prompt in load_prompts(load_recipe("tiny", ["prompts.0.limit=12"]).prompts)
]
PARAMS = SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=200, logprobs=3)
SEED = 7


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving("tiny-r1", "--request-bytes", 100_000) as server:
        yield server


@pytest.fixture(scope="module")
def offline() -> dict[tuple[str, int], backends.Completed]:
    """What the local engine answers: two samples of each prompt."""
    with backends.open(teacher_of("teacher", "tiny-r1"), LocalEngine()) as backend:
        jobs = [Job(prompt, (0, 1)) for prompt in PROMPTS]
        return {(done.prompt.id, done.sample): done for done in backend.complete(jobs, PARAMS, SEED)}


def client(served: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)


def ask(served: Serving, prompt: Prompt, **more: object):
    values = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 200, "seed": SEED} | more
    return client(served).chat.completions.create(model="tiny-r1", messages=[*prompt.messages], **values)


def post(served: Serving, path: str = "/v1/chat/completions", **body: object) -> httpx2.Response:
    return httpx2.post(served.root + path, json=body, timeout=60)


LONG = {"max_tokens": 2000, "ignore_eos": True}
HELLO = [{"role": "user", "content": "What is 1 + 2?"}]


def metric(served: Serving, name: str) -> float:
    lines = httpx2.get(served.root + "/metrics").text.splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(name)))


def within(seconds: float, condition) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# ---- the official client


def test_the_text_is_that_of_the_local_engine(served, offline):
    for prompt in PROMPTS:
        answer = ask(served, prompt, n=2)
        for sample, choice in enumerate(answer.choices):
            local = offline[prompt.id, sample]
            assert (choice.message.reasoning_content, choice.message.content) == split_reasoning(local.text)
            assert choice.finish_reason == local.finish_reason == "stop"
        tokens = sum(len(offline[prompt.id, sample].completion_token_ids) for sample in (0, 1))
        assert answer.usage.completion_tokens == tokens
        assert answer.usage.prompt_tokens == len(offline[prompt.id, 0].prompt_token_ids)


def test_a_stream_has_the_same_text_in_parts(served, offline):
    for prompt in PROMPTS[:4]:
        reasoning, content, reasons, usage, parts = ["", ""], ["", ""], {}, None, 0
        for chunk in ask(served, prompt, n=2, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                parts += 1
                reasoning[choice.index] += getattr(choice.delta, "reasoning_content", None) or ""
                content[choice.index] += choice.delta.content or ""
                reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
        for sample in (0, 1):
            assert (reasoning[sample], content[sample]) == split_reasoning(offline[prompt.id, sample].text)
        assert reasons == {0: "stop", 1: "stop"} and parts > 20
        assert usage.completion_tokens == sum(len(offline[prompt.id, n].completion_token_ids) for n in (0, 1))


@pytest.mark.parametrize("stream", [False, True])
def test_probabilities_and_ids(served, offline, stream):
    prompt, local = PROMPTS[0], offline[PROMPTS[0].id, 1]
    more = {"logprobs": True, "top_logprobs": 3, "stream": stream}
    extra = {"return_token_ids": True, "separate_reasoning": False, "sample": 1, "prompt_key": prompt.id}
    answer = ask(served, prompt, **more, extra_body=extra)
    chunks = [chunk for chunk in answer if chunk.choices] if stream else [answer]
    choices = [chunk.choices[0] for chunk in chunks]
    ids = [token for choice in choices for token in choice.token_ids]
    rows = [row for choice in choices if choice.logprobs for row in choice.logprobs.content]
    assert tuple(ids) == local.completion_token_ids == tuple(row.token_id for row in rows)
    assert tuple(chunks[0].prompt_token_ids) == local.prompt_token_ids
    assert tuple(row.logprob for row in rows) == pytest.approx(local.logprobs, abs=1e-6)
    assert [[top.token_id for top in row.top_logprobs] for row in rows] == [
        [token for token, _ in tops] for tops in local.top_logprobs
    ]
    text = "".join((c.delta.content or "" if stream else c.message.content) for c in choices)
    assert text == local.text


def test_stop_strings_end_a_text_and_are_not_in_it(served, offline):
    prompt = PROMPTS[0]
    whole = offline[prompt.id, 0].text
    stop = whole[30:34]
    expected = whole[: whole.index(stop)]
    for stream in (False, True):
        answer = ask(
            served, prompt, stop=[stop, "never there"], stream=stream, extra_body={"separate_reasoning": False}
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        text = "".join((c.delta.content or "") if stream else c.message.content for c in choices)
        assert text == expected and choices[-1].finish_reason == "stop"


def test_text_completions_continue_text_and_ids(served):
    text = "What is 1 + 2?"
    given = {"max_tokens": 8, "temperature": 0.0, "logprobs": 2}
    made = client(served).completions.create(model="tiny-r1", prompt=[text, text + " "], n=2, **given)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3] and made.choices[0].text == made.choices[1].text
    assert made.choices[0].finish_reason in ("length", "stop") and made.usage.completion_tokens <= 32
    assert len(made.choices[0].logprobs.tokens) == len(made.choices[0].logprobs.token_logprobs) <= 8
    parts = client(served).completions.create(model="tiny-r1", prompt=text, stream=True, **given)
    assert "".join(part.choices[0].text for part in parts) == made.choices[0].text
    ids = post(served, "/v1/completions", prompt=text, max_tokens=1, return_token_ids=True).json()["choices"][0]
    again = client(served).completions.create(model="tiny-r1", prompt=ids["prompt_token_ids"], **given)
    assert again.choices[0].text == made.choices[0].text


def test_models_and_health(served):
    (model,) = client(served).models.list()
    assert (model.id, model.owned_by, model.max_model_len) == ("tiny-r1", "distill", 4096)
    assert client(served).models.retrieve("tiny-r1").id == "tiny-r1"
    assert httpx2.get(served.root + "/health").status_code == 200
    with pytest.raises(openai.NotFoundError):
        client(served).models.retrieve("other")


def test_a_thinking_budget_closes_the_block_and_the_answer_follows(served, offline):
    prompt = PROMPTS[0]
    with backends.open(teacher_of("teacher", "tiny-r1"), LocalEngine()) as backend:
        params = replace(PARAMS, thinking_budget=12)
        (local,) = backend.complete([Job(prompt, (0,))], params, SEED)
    whole = offline[prompt.id, 0]
    assert local.completion_token_ids[:12] == whole.completion_token_ids[:12]
    answer = ask(served, prompt, extra_body={"thinking_budget": 12, "return_token_ids": True})
    assert tuple(answer.choices[0].token_ids) == local.completion_token_ids
    reasoning, response = split_reasoning(local.text)
    assert (answer.choices[0].message.reasoning_content, answer.choices[0].message.content) == (reasoning, response)
    assert response and split_reasoning(whole.text)[0].startswith(reasoning) and len(reasoning) < 40
    with backends.open(Model("m", Server(served.url)), LocalEngine()) as backend:
        (remote,) = backend.complete([Job(prompt, (0,))], params, SEED)
    assert (remote.text, remote.completion_token_ids) == (local.text, local.completion_token_ids)


# ---- many at once


def test_64_clients_at_once_and_none_starves(served, offline):
    def run(number: int) -> float:
        begun = time.monotonic()
        prompt = PROMPTS[number % len(PROMPTS)]
        answer = ask(served, prompt)
        expected = split_reasoning(offline[prompt.id, 0].text)
        assert (answer.choices[0].message.reasoning_content, answer.choices[0].message.content) == expected
        return time.monotonic() - begun

    with ThreadPoolExecutor(64) as pool:
        assert len(list(pool.map(run, range(128)))) == 128
    assert metric(served, "distill_samples_running") == 0 and metric(served, "distill_requests_waiting") == 0


def test_generate_through_the_server_gives_the_traces_of_a_local_run(served, tmp_path, monkeypatch, capsys):
    """And so the same distributions for a student to learn from."""
    recipe = yaml.safe_load(Path("recipes/tiny.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    stored = {}
    for name, server in (("local", None), ("remote", {"url": served.url, "model": "tiny-r1"})):
        recipe |= {"name": "tiny", "server": server}
        recipe["prompts"][0]["limit"] = 30
        recipe["generate"] |= {"samples": 2, "logprobs": 4}
        recipe["train"] |= {"objective": {"kind": "logits", "top_k": 4}, "max_steps": 1}
        recipe["engine"] = {"dtype": "bfloat16"}  # as the server has it
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
        for stage in ("generate", "filter", "train"):
            monkeypatch.setattr("sys.argv", ["distill", stage, "./tiny.yaml", "--run-dir", name])
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 0, capsys.readouterr().err
        stored[name] = {trace.key: trace for trace in TraceStore(tmp_path / name / "traces")}
    assert len(stored["local"]) == 60 and stored["local"].keys() == stored["remote"].keys()
    for key, local in stored["local"].items():
        remote = stored["remote"][key]
        assert remote.logprobs is not None and remote.prompt_tokens is not None
        assert remote == replace(local, teacher=remote.teacher)  # the model is named by weights, and by the server
    for file in ("tokens/teacher-ids.npy", "tokens/teacher-logprobs.npy", "student/model.safetensors"):
        assert (tmp_path / "local" / file).read_bytes() == (tmp_path / "remote" / file).read_bytes()


# ---- refusals


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "other"}, 404, "the model is tiny-r1"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 5000}, 400, "context of 4,096"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "3"}]}, 400, "assistant"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"temprature": 1}, 400, "temprature: unknown parameter"),
        ({"chat_template_kwargs": {"thinking": False}}, 400, "one mode only"),
        ({"chat_template_kwargs": {"reasoning_effort": "max"}}, 400, "no levels of thinking"),
        ({"chat_template_kwargs": {"other": 1}}, 400, "chat_template_kwargs.other"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, 413, "100,000 bytes"),
        ({"top_logprobs": 2}, 400, "logprobs: true"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only parts of type text"),
        ({"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, 400, "name of a message is not supported"),
        ({"messages": [{"role": "user", "content": "a", "prefix": True}]}, 400, "messages.0.prefix: unknown parameter"),
        ({"messages": [{"role": "user", "content": "a", "reasoning": "b"}]}, 400, "reasoning of a message is text"),
        ({"n": 0}, 400, "n:"),
        ({"stop": [""]}, 400, "stop"),
        ({"seed": 2**70}, 400, "seed"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(served, change, status, words):
    reply = post(served, **({"messages": HELLO} | change))
    error = reply.json()["error"]
    assert reply.status_code == status and words in error["message"] and "\n" not in error["message"], error


def test_the_parameter_at_fault_is_named(served):
    for change in ({"frequency_penalty": 1}, {"top_logprobs": 2}, {"temperature": -1}):
        assert post(served, messages=HELLO, **change).json()["error"]["param"] == next(iter(change))


def test_parts_of_text_are_one_text(served):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 2?"}]
    whole = post(served, messages=HELLO, seed=1, max_tokens=20).json()["choices"]
    assert post(served, messages=[{"role": "user", "content": parts}], seed=1, max_tokens=20).json()["choices"] == whole


def test_other_addresses_are_errors_of_the_protocol_too(served):
    for reply in (httpx2.get(served.url + "/nothing"), httpx2.get(served.url + "/chat/completions")):
        assert reply.status_code in (404, 405) and "no endpoint GET" in reply.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 50_000, b'{"messages": NaN}'])
def test_bodies_that_are_no_request(served, body):
    reply = httpx2.post(served.url + "/chat/completions", content=body)
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_parameters_that_change_nothing_are_taken(served):
    ignored = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "presence_penalty": 0,
        "logit_bias": {},
        "tools": [],
    }
    assert post(served, messages=HELLO, max_tokens=2, **ignored).status_code == 200


def test_other_hosts_do_not_get_in_without_a_key(served):
    for host, status in (("evil.example", 403), ("evil.example:80", 403), ("localhost:1", 200), ("[::1]:80", 200)):
        assert httpx2.get(served.url + "/models", headers={"Host": host}).status_code == status


def test_a_client_that_goes_away_frees_its_slot(served):
    body = {"messages": HELLO, "n": 32} | LONG
    for stream in (False, True):
        with (
            suppress(httpx2.TimeoutException),
            httpx2.stream("POST", served.url + "/chat/completions", json=body | {"stream": stream}, timeout=1) as reply,
        ):
            assert stream
            next(reply.iter_lines())
        assert metric(served, "distill_samples_running") in (0, 32)
        assert within(10, lambda: metric(served, "distill_samples_running") == 0)


def test_a_client_has_a_limit_and_the_server_says_when_to_come_back():
    with serving("tiny-r1", "--per-client", 1) as server:
        body = {"messages": HELLO, "stream": True} | LONG
        with httpx2.stream("POST", server.url + "/chat/completions", json=body, timeout=60) as first:
            lines = first.iter_lines()
            next(lines)
            second = post(server, messages=HELLO)
            assert second.status_code == 429 and second.headers["retry-after"] == "1"
            assert second.json()["error"]["code"] == "rate_limit_exceeded"
        assert within(20, lambda: metric(server, "distill_samples_running") == 0)
        assert post(server, messages=HELLO, max_tokens=2).status_code == 200


# ---- the end


def test_a_key_is_needed_where_one_is_set():
    with serving("tiny-r1", "--api-key-env", "MY_KEY", MY_KEY="sk-secret") as server:
        assert httpx2.get(server.url + "/models").status_code == 401
        assert httpx2.get(server.url + "/models", headers={"Authorization": "Bearer sk-secreT"}).status_code == 401
        assert httpx2.get(server.url + "/models", headers={"Authorization": "Bearer sk-secret"}).status_code == 200
        assert httpx2.get(server.root + "/health").status_code == 200
        code, out, err = server.stop()
    assert code == 0 and "sk-secret" not in out + err


@pytest.mark.slow
@pytest.mark.parametrize(("grace", "reason"), [pytest.param(60, "length", marks=pytest.mark.slow), (0, "abort")])
def test_the_end_finishes_or_returns_what_runs(grace, reason):
    with serving("tiny-r1", "--grace", grace) as server:
        body = {"messages": HELLO, "return_token_ids": True, "seed": 0} | LONG
        replies = []
        thread = threading.Thread(
            target=lambda: replies.append(httpx2.post(server.url + "/chat/completions", json=body, timeout=60).json())
        )
        thread.start()
        assert within(20, lambda: metric(server, "distill_samples_running") == 1)
        code, out, err = server.stop()
        thread.join()
    assert code == 0 and err == "" and "Traceback" not in out
    (choice,) = replies[0]["choices"]
    assert choice["finish_reason"] == reason
    assert (len(choice["token_ids"]) == 2000) == (reason == "length")


def test_an_aborted_answer_is_asked_for_again_by_generate():
    """`abort` is no end of a text."""
    with pytest.raises(Unreadable):
        reply_of({"content": "half"}, "abort", None)


@pytest.mark.slow
def test_the_servers_end_with_its_engine():
    with serving("tiny-r1") as server:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        workers = [c for c in children if b"distill.engine.worker" in Path(f"/proc/{c}/cmdline").read_bytes()]
        (worker,) = workers
        os.kill(int(worker), 9)
        _, err = server.process.communicate(timeout=30)
        assert server.process.returncode == 1
        assert err.count("\n") == 1 and "died" in err and "start the server again" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny-r1", "--host", "0.0.0.0"], "--api-key-env"),
        (["tiny-r1", "--api-key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE is not set"),
        (["tiny-r2"], "tiny-r1"),
        (["no/such/dir"], "no/such/dir"),
        (["tiny-r1", "--host", "203.0.113.1", "--api-key-env", "HOME"], "cannot listen"),
        (["tiny-r1", "--set", "engine.dtypes=float32"], "dtype"),
    ],
)
def test_wrong_arguments(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["distill", "serve", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and words in err and err.count("\n") == 1, err


def test_a_remote_backend_knows_the_server(served):
    with backends.open(Model("m", Server(served.url)), LocalEngine()) as backend:
        assert backend.identity == {"model": "tiny-r1"}
        (done,) = backend.complete([Job(PROMPTS[0], (1,))], PARAMS, SEED)
    assert done.completion_token_ids and done.top_logprobs
