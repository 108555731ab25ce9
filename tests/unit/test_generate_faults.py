"""A server that fails one request in five, in all ways that servers fail: every sample is stored exactly once."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from server_support import JSON, KEY, Answer, Handler, body, chat, server

from distill.artefacts import FilterSummary, RunPaths
from distill.catalog import load_recipe
from distill.errors import UserError, WorkError
from distill.pipeline import run_recipe
from distill.traces.store import TraceStore

EVENTS = "text/event-stream"
OTHER_HOST = "http://192.0.2.1/v1/chat/completions"  # an address for documentation: nobody is there


def events(content: str, finish: str | None = "stop", end: bool = True) -> bytes:
    """A stream of a few letters a chunk, with a comment that keeps the connection alive."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": content[i : i + 7]}}]} for i in range(0, len(content), 7)]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    chunks.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}})
    lines = [b": keep-alive\n\n", *(b"data: " + body(chunk) + b"\r\n\r\n" for chunk in chunks)]
    return b"".join(lines) + (b"data: [DONE]\n\n" if end else b"")


def cut(handler: Handler) -> Answer:
    """Announces more than it sends, and hangs up."""
    handler.send_response(200)
    handler.send_header("Content-Type", JSON)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    raise ConnectionAbortedError


def hang(handler: Handler) -> Answer:
    time.sleep(2.5)
    raise ConnectionAbortedError


FAULTS = {
    "busy": lambda handler: (429, f"{JSON}\r\nRetry-After: 0", b"{}"),
    "busy, without a time": lambda handler: (429, JSON, b"{}"),
    "busy, until a day in the past": lambda handler: (
        503,
        f"{JSON}\r\nRetry-After: Wed, 21 Oct 2015 07:28:00 GMT",
        b"{}",
    ),
    "error": lambda handler: (500, "text/html", b"<html>oops</html>"),
    "cut": cut,
    "hang": hang,
    "empty": lambda handler: (200, JSON, b""),
    "not JSON": lambda handler: (200, JSON, b'{"choices": [{"mess'),
    "not UTF-8": lambda handler: (200, JSON, b'{"choices": "\xff\xfe"}'),
    "redirect": lambda handler: (307, f"{JSON}\r\nLocation: {OTHER_HOST}", b""),
    "20 MB": lambda handler: (200, JSON, body(chat(message={"content": "x" * 20_000_000}))),
    "a stream that ends in the middle": lambda handler: (200, EVENTS, events("<think>\na", None, end=False)),
    "an error in the stream": lambda handler: (200, EVENTS, b'data: {"error": {"message": "overloaded"}}\n\n'),
}
ANSWERS = {
    "reasoning apart": lambda: (200, JSON, body(chat())),
    "both tags, streamed": lambda: (200, EVENTS, events("<think>\ntwice two\n</think>\n\nSo it is \\boxed{4}.")),
    "the closing tag alone": lambda: (200, EVENTS, events("twice two\n</think>\n\nSo it is \\boxed{4}.")),
    "truncated": lambda: (200, EVENTS, events("twice two, so", "length")),
}


class Faulty:
    """Fails a share of the requests, drawn by their seed and attempt, so that a rerun meets other faults."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.attempts, self.answered, self.faults = Counter(), Counter(), Counter()

    def __call__(self, number: int, handler: Handler) -> Answer:
        assert handler.headers["Authorization"] == f"Bearer {KEY}"
        seed = handler.server.asked[number]["seed"]
        with handler.server.lock:
            self.attempts[seed] += 1
            draw = random.Random(f"{seed} {self.attempts[seed]}")
            if draw.random() < self.share:
                fault = draw.choice(list(FAULTS))
                self.faults[fault] += 1
            else:
                fault = None
                self.answered[seed] += 1
        return FAULTS[fault](handler) if fault else draw.choice(list(ANSWERS.values()))()


def write_recipe(directory: Path, url: str, problems: int, samples: int) -> Path:
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(problems)]
    (directory / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = {"url": url, "model": "m", "concurrency": 64, "silence": 1.5, "api_key_env": "FAULTY_KEY"}
    content = {
        "name": "faulty",
        "teacher": "deepseek-r1",
        "student": "tiny-qwen",
        "server": server,
        "prompts": [{"kind": "file", "path": str(directory / "sums.jsonl")}],
        "generate": {"samples": samples, "sampling": {"max_new_tokens": 512}},
        "eval": {"benchmarks": ["tiny-arithmetic"]},
    }
    path = directory / "faulty.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def address(made) -> str:
    return f"http://127.0.0.1:{made.server_address[1]}/v1"


def stored(run: Path) -> Counter:
    return Counter(trace.key for trace in TraceStore(run / "traces"))


def assert_no_key(*places: Path) -> None:
    for path in (path for place in places for path in place.rglob("*") if path.is_file()):
        assert KEY.encode() not in path.read_bytes(), path


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("FAULTY_KEY", KEY)


@pytest.mark.slow
def test_a_fifth_of_the_requests_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.01)
    faulty, run = Faulty(0.2), tmp_path / "run"
    with server(faulty) as made:
        recipe = str(write_recipe(tmp_path, address(made), problems=150, samples=2))
        run_recipe(load_recipe(recipe), run, ["generate"])
        asked = len(made.asked)
        run_recipe(load_recipe(recipe, ["generate.samples=4"]), run, ["generate"])
    assert len(faulty.faults) == len(FAULTS) and asked > 300
    assert set(faulty.answered.values()) == {1}, "what was answered is never asked again"
    assert len(stored(run)) == 600 and set(stored(run).values()) == {1}
    forms = Counter((trace.reasoning, trace.response, trace.finish_reason) for trace in TraceStore(run / "traces"))
    assert set(forms) == {
        ("twice two", "So it is \\boxed{4}.", "stop"),
        (None, "twice two, so", "length"),
    }
    assert all(trace.completion_tokens == 7 for trace in TraceStore(run / "traces"))
    assert_no_key(tmp_path)


@pytest.mark.slow
def test_five_thousand_samples_and_three_kills(tmp_path):
    faulty, run = Faulty(0.2), tmp_path / "run"
    with server(faulty) as made:
        recipe = write_recipe(tmp_path, address(made), problems=2500, samples=2)
        command = [sys.executable, "-m", "distill.command", "generate", str(recipe), "--run-dir", str(run)]
        for number in range(1, 4):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            deadline = time.monotonic() + 120
            while sum(faulty.answered.values()) < 1200 * number and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        first = len(made.asked)
        more = subprocess.run([*command, "--set", "generate.samples=4"], capture_output=True, text=True)
        assert more.returncode == 0, more.stderr
    assert len(stored(run)) == 10_000 and set(stored(run).values()) == {1}
    seeds = [asked["seed"] for asked in made.asked]
    assert not set(seeds[:first]) & set(seeds[first:]) and len(set(seeds[first:])) == 5000
    twice = sum(count - 1 for count in faulty.answered.values())
    assert twice <= 3 * 64, "a kill costs what was under way"
    assert_no_key(tmp_path)
    assert KEY not in done.stdout + done.stderr + more.stdout + more.stderr


# ---- failures that stay


def test_a_sample_that_is_refused_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.01)

    def reply(number: int, handler: Handler) -> Answer:
        question = handler.server.asked[number]["messages"][-1]["content"]
        refused = question.startswith(tuple(f"What is {n} +" for n in range(10)))
        return (400, JSON, b'{"error": {"message": "no"}}') if refused else (200, JSON, body(chat()))

    with server(reply) as made:
        path = str(write_recipe(tmp_path, address(made), problems=40, samples=2))
        recipe = load_recipe(path, ["filter.correct=false"])
        for _ in range(2):
            run_recipe(recipe, tmp_path / "run", ["generate", "filter"])
        assert len(made.asked) == 80
    assert len(stored(tmp_path / "run")) == 80
    out = capsys.readouterr().out
    assert re.search(r"note: the server refused 20 samples, .*; the first: prompt \w+: the server refused .*no", out)
    funnel = FilterSummary.read(RunPaths(tmp_path / "run").funnel, "").funnel
    assert next(step for step in funnel if step.filter == "finish").reasons == {"refused": 20}


def test_a_server_that_is_down_ends_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.001)
    monkeypatch.setattr("distill.backends.failures.GRACE", 0.5)
    with server(lambda number, handler: (500, JSON, b"{}")) as made:
        recipe = load_recipe(str(write_recipe(tmp_path, address(made), problems=500, samples=2)))
        with pytest.raises(WorkError, match=r"\d+ samples failed; the first: the server failed"):
            run_recipe(recipe, tmp_path / "run", ["generate"])
    assert len({asked["seed"] for asked in made.asked}) < 200, "not every sample is tried on a server that is down"


def test_a_redirect_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.001)
    elsewhere = []
    with server(lambda number, handler: elsewhere.append(1) or (200, JSON, body(chat()))) as other:
        away = (307, f"{JSON}\r\nLocation: {address(other)}/chat/completions", b"")
        with server(lambda number, handler: away) as made:
            recipe = load_recipe(str(write_recipe(tmp_path, address(made), problems=1, samples=1)))
            with pytest.raises(WorkError, match=rf"redirects to {address(other)}/chat/completions, which is not foll"):
                run_recipe(recipe, tmp_path / "run", ["generate"])
        with server(lambda number, handler: away, away) as made:
            recipe = load_recipe(str(write_recipe(tmp_path, address(made), problems=1, samples=1)))
            with pytest.raises(UserError, match="redirects to"):
                run_recipe(recipe, tmp_path / "run", ["generate"])
    assert not elsewhere and not other.asked
