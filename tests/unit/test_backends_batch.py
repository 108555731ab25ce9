"""A provider's batch API: nothing is asked for twice, whatever is interrupted, and what fails is asked for again."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from server_support import JSON, KEY, Handler, Listening, body, chat, listening

from distill import backends
from distill.backends import Job, SamplingParams
from distill.backends.batch import request_id
from distill.backends.budget import Allowance, Spent
from distill.backends.failures import Refused
from distill.errors import UserError, WorkError
from distill.models import Model, Server
from distill.prompts import Prompt
from distill.recipe import Budget, LocalEngine

PARAMS = SamplingParams(temperature=0.6, max_new_tokens=64)
PROMPTS = [Prompt.from_question(f"{n} + {n}?", str(2 * n)) for n in range(5)]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.backends.batch.POLL", 0.01)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


class Provider(Handler):
    """Files and batches in memory. A batch ends when it was asked about `polls` times; `outcome(custom_id)` is the
    response of its line, None for no line; `refusal(body)` is the error of a request, as a response in the error file.
    `failed`: errors of the next batch, which then has no answers. `lost`: batches whose creation is not reported.
    `overloaded`: requests to create one that fail."""

    def do_GET(self) -> None:
        state, path = self.server, urlsplit(self.path).path
        if path == "/v1/models":
            self.send(200, JSON, body({"object": "list", "data": [{"id": "m"}]}))
        elif path == "/v1/batches":
            self.send(200, JSON, body({"object": "list", "data": list(state.batches.values()), "has_more": False}))
        elif match := re.fullmatch(r"/v1/batches/(\w+)", path):
            batch = state.batches[match[1]]
            state.polled[match[1]] = state.polled.get(match[1], 0) + 1
            if state.polled[match[1]] >= state.polls:
                self.end(batch)
            self.send(200, JSON, body(batch))
        elif match := re.fullmatch(r"/v1/files/(\w+)/content", path):
            self.send(200, "application/octet-stream", state.files[match[1]])

    def do_POST(self) -> None:
        state, content = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        state.keys.add(self.headers["Authorization"])
        if self.path == "/v1/files":
            if state.refuses:
                self.send(404, JSON, body({"error": {"message": "no such page"}}))
                return
            name = f"file{len(state.files)}"
            state.files[name] = re.search(rb'filename="requests.jsonl".*?\r\n\r\n(.*?)\r\n--', content, re.DOTALL)[1]
            self.send(200, JSON, body({"id": name, "object": "file", "purpose": "batch"}))
        else:
            if state.overloaded:
                state.overloaded -= 1
                self.send(503, JSON, b"{}")
                return
            asked = json.loads(content)
            name = f"batch{len(state.batches)}"
            state.batches[name] = {
                "id": name,
                "object": "batch",
                "status": "in_progress",
                "output_file_id": None,
            } | asked
            if state.lost:
                state.lost -= 1
                self.send(502, JSON, b"<html>bad gateway</html>")
            else:
                self.send(200, JSON, body(state.batches[name]))

    def end(self, batch) -> None:
        lines, refused, state = [], [], self.server
        if state.failed:
            batch |= {"status": "failed", "errors": {"object": "list", "data": state.failed}}
            state.failed = []
            return
        for line in self.server.files[batch["input_file_id"]].splitlines():
            asked = json.loads(line)
            if (error := state.refusal(asked["body"])) is not None:
                response = {"status_code": 400, "body": {"error": error}}
                refused.append(json.dumps({"custom_id": asked["custom_id"], "response": response, "error": None}))
                continue
            response = self.server.outcome(asked["custom_id"])
            if response is not None:
                lines.append(json.dumps({"custom_id": asked["custom_id"], "response": response, "error": None}))
        name = f"file{len(self.server.files)}"
        self.server.files[name] = "\n".join(lines).encode()
        batch |= {"status": "completed", "output_file_id": name}
        if refused:
            self.server.files["errors" + name] = "\n".join(refused).encode()
            batch["error_file_id"] = "errors" + name

    def end_all(self) -> None:
        for batch in self.server.batches.values():
            self.end(batch)


@contextmanager
def provider(
    outcome=None, polls: int = 1, refusal=lambda body: None, failed=(), lost=0, overloaded=0
) -> Iterator[Listening]:
    outcome = outcome or (lambda key: {"status_code": 200, "body": chat()})
    state = {"files": {}, "batches": {}, "polled": {}, "keys": set(), "refuses": False}
    state |= {"refusal": refusal, "failed": list(failed), "lost": lost, "overloaded": overloaded}
    with listening(Provider, **state, polls=polls, outcome=outcome) as made:
        yield made


@contextmanager
def opened(made):
    place = Server(f"http://127.0.0.1:{made.server_address[1]}/v1", "m", KEY, batch=True)
    with backends.open(Model("m", place), LocalEngine()) as backend:
        yield backend


def jobs(samples=2, prompts=PROMPTS):
    return [Job(prompt, tuple(range(samples))) for prompt in prompts]


def requests(made) -> list[str]:
    """The custom ids of all requests that were sent, in order."""
    files = [made.files[batch["input_file_id"]] for batch in made.batches.values()]
    return [json.loads(line)["custom_id"] for file in files for line in file.splitlines()]


def test_every_sample_is_asked_for_once_in_one_file():
    with provider() as made, opened(made) as backend:
        done = list(backend.complete(jobs(), PARAMS, 0))
        assert backend.usage.completion_tokens == 70
    assert {(d.prompt.id, d.sample) for d in done} == {(p.id, n) for p in PROMPTS for n in (0, 1)}
    assert done[0].text.startswith("<think>\ntwice two") and done[0].completion_tokens == 7
    assert len(requests(made)) == 10 == len(set(requests(made)))
    (batch,) = made.batches.values()
    asked = json.loads(made.files[batch["input_file_id"]].splitlines()[0])
    assert (asked["url"], asked["body"]["model"], asked["body"]["max_tokens"]) == ("/v1/chat/completions", "m", 64)
    assert "stream" not in asked["body"] and made.keys == {f"Bearer {KEY}"}


def test_an_interrupted_run_finds_its_batch_and_asks_for_the_new_samples_alone():
    with provider(polls=10**9) as made:
        with opened(made) as backend, pytest.MonkeyPatch.context() as patch:  # killed while it waits
            patch.setattr("distill.backends.batch.asyncio.sleep", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(backend.complete(jobs(1), PARAMS, 0))
        assert len(requests(made)) == 5
        made.polls = 1
        with opened(made) as backend:
            assert len(list(backend.complete(jobs(2), PARAMS, 0))) == 10
        assert len(requests(made)) == 10 == len(set(requests(made)))
        with opened(made) as backend:  # other settings are other samples
            assert len(list(backend.complete(jobs(1), PARAMS, 1))) == 5
        assert len(requests(made)) == 15


def test_the_same_prompt_with_another_suffix_is_another_request():
    asked = [
        replace(PROMPTS[0], messages=({"role": "user", "content": text},)) for text in ("2 + 2?", "2 + 2? Briefly.")
    ]
    with provider() as made:
        for prompt in asked:
            with opened(made) as backend:
                assert len(list(backend.complete([Job(prompt, (0,))], PARAMS, 0))) == 1
        assert len(made.batches) == 2 == len(set(requests(made)))


async def interrupted(seconds: float) -> None:
    raise KeyboardInterrupt


def test_what_failed_is_asked_for_again_and_nothing_else():
    failing = {request_id(PROMPTS[0], 0): {"status_code": 500, "body": {}}, request_id(PROMPTS[1], 1): None}
    failing[request_id(PROMPTS[2], 0)] = {"status_code": 200, "body": {"choices": []}}
    made_outcome = {"first": True}

    def outcome(key: str):
        return failing[key] if made_outcome["first"] and key in failing else {"status_code": 200, "body": chat()}

    with provider(outcome) as made:
        with opened(made) as backend:
            done = []
            with pytest.raises(WorkError, match="3 samples were not answered"):
                for each in backend.complete(jobs(), PARAMS, 0):
                    done.append(each)
            assert len(done) == 7
        made_outcome["first"] = False
        left = [Job(PROMPTS[0], (0,)), Job(PROMPTS[1], (1,)), Job(PROMPTS[2], (0,))]
        with opened(made) as backend:
            assert len(list(backend.complete(left, PARAMS, 0))) == 3
    assert requests(made)[10:] == list(failing)


def test_a_large_request_is_several_batches(monkeypatch):
    monkeypatch.setattr("distill.backends.batch.MOST_REQUESTS", 4)
    with provider() as made, opened(made) as backend:
        assert len(list(backend.complete(jobs(), PARAMS, 0))) == 10
        assert len(made.batches) == 3
    monkeypatch.setattr("distill.backends.batch.MOST_BYTES", 1)
    with provider() as made, opened(made) as backend:
        assert len(list(backend.complete(jobs(1), PARAMS, 0))) == 5
        assert len(made.batches) == 5


def test_a_server_without_a_batch_api_is_refused():
    with provider() as made, opened(made) as backend:
        made.refuses = True
        with pytest.raises(UserError, match="set server.batch to false"):
            list(backend.complete(jobs(), PARAMS, 0))


def test_a_batch_that_outlasts_the_budget_is_left_to_the_provider(monkeypatch, capsys):
    """With a higher budget the same command collects its answers."""
    monkeypatch.setattr("distill.backends.batch.POLL", 0.05)
    allowance = Allowance(Budget(hours=1.0), PARAMS.max_new_tokens, Spent(), 3600 - 3.0)
    with provider(polls=300) as made:
        with opened(made) as backend:
            assert list(backend.complete(jobs(1), PARAMS, 0, allowance)) == []
        assert "batch0 goes on at the provider" in " ".join(capsys.readouterr().out.split())
        made.polls = 1
        with opened(made) as backend:
            assert len(list(backend.complete(jobs(1), PARAMS, 0))) == 5
        assert len(made.batches) == 1


# ---- refusals


def test_a_batch_that_failed_says_why():
    failed = [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached.", "line": None, "param": None}]
    with provider(failed=failed) as made:
        with (
            opened(made) as backend,
            pytest.raises(WorkError, match="batch batch0 failed: Enqueued token limit") as error,
        ):
            list(backend.complete(jobs(1), PARAMS, 0))
        assert "5 samples were not answered" in str(error.value) and len(made.batches) == 1
        with opened(made) as backend:
            assert len(list(backend.complete(jobs(1), PARAMS, 0))) == 5


def test_requests_that_are_refused_say_why_and_which_they_are():
    def refusal(body):
        return {"message": f"no such tool, {KEY}"} if body["messages"][0]["content"].startswith("0") else None

    with provider(refusal=refusal) as made, opened(made) as backend:
        done = []
        with pytest.raises(
            Refused, match=r"1 samples were not .*status 400: no such tool, \*\*\*; correct the sampling"
        ) as error:
            for each in backend.complete(jobs(1), PARAMS, 0):
                done.append(each)
    assert len(done) == 4 and len(made.batches) == 1
    (refusal,) = error.value.refusals
    assert (refusal.prompt, refusal.sample) == (PROMPTS[0], 0) and "no such tool, ***" in refusal.reason


@pytest.mark.parametrize("as_a_whole", [False, True])
def test_a_refused_parameter_is_left_out_of_a_second_batch(as_a_whole, capsys):
    error = {"message": "Unsupported value", "param": "temperature", "code": "unsupported_value"}

    def refusal(body):
        return error if "temperature" in body and not as_a_whole else None

    with provider(refusal=refusal, failed=[error | {"line": 1}] if as_a_whole else ()) as made:
        with opened(made) as backend:
            done = list(backend.complete(jobs(1), PARAMS, 0))
        assert {each.omitted for each in done} == {("temperature",)} and len(done) == 5 and len(made.batches) == 2
        assert capsys.readouterr().out.count("refuses temperature") == 1
        with opened(made) as backend:  # known from the provider's list, without another request
            done = list(backend.complete(jobs(1), PARAMS, 0))
        assert {each.omitted for each in done} == {("temperature",)} and len(made.batches) == 2
        with opened(made) as backend:  # the refusal is known, too
            assert len(list(backend.complete(jobs(2), PARAMS, 0))) == 10
        assert len(made.batches) == 3


def test_answers_without_the_log_probabilities_that_were_asked_for_are_refused():
    with provider() as made, opened(made) as backend, pytest.raises(UserError, match="gives no log-probabilities"):
        list(backend.complete(jobs(1), replace(PARAMS, logprobs=2), 0))


@pytest.mark.parametrize("fault", [{"lost": 1}, {"overloaded": 2}, {"overloaded": 1, "lost": 1}])
def test_a_batch_whose_creation_was_not_reported_is_found_and_not_created_twice(fault, monkeypatch):
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.01)
    with provider(**fault) as made, opened(made) as backend:
        assert len(list(backend.complete(jobs(1), PARAMS, 0))) == 5
        assert len(made.batches) == 1
