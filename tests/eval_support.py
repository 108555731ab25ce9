"""A server that follows a script, and a small benchmark, for tests of evaluations."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import pytest
from server_support import Listening, listening

from distill.cli import main
from distill.evaluations import read_results

USAGE: dict[str, object] = {}  # further fields of the usage


class Script(BaseHTTPRequestHandler):
    """Answers chat requests as `reply(question, seed)` says: (text, finish reason), or an HTTP status."""

    def do_GET(self):
        self.send_json(
            {"object": "list", "data": [{"id": "scripted", "object": "model", "created": 0, "owned_by": ""}]}
        )

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.keys.append(self.headers["Authorization"])
        made = self.server.reply(asked["messages"][-1]["content"], asked.get("seed"))
        if isinstance(made, int):
            self.send_json({"error": {"message": "scripted"}}, made)
            return
        text, finish = made
        message = {"role": "assistant", "content": text}
        if isinstance(text, tuple):
            message = {"role": "assistant", "reasoning_content": text[0], "content": text[1]}
        tokens = 7 if text else 0
        self.send_json(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "scripted",
                "choices": [{"index": 0, "finish_reason": finish, "message": message}],
                "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens} | USAGE,
            }
        )

    def send_json(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def server(reply) -> Iterator[Listening]:
    with listening(Script, reply=reply, asked=[], keys=[]) as made:
        yield made


def url(made) -> str:
    return f"http://127.0.0.1:{made.server_address[1]}/v1"


def distill(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["distill", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.fixture
def sums(tmp_path):
    """A card of a benchmark with eight problems, `What is n + n?`."""
    return write_sums(tmp_path)


@pytest.fixture(scope="module")
def shared_sums(tmp_path_factory):
    """`sums`, for evaluations that the tests of a module share."""
    return write_sums(tmp_path_factory.mktemp("sums"))


def write_sums(directory):
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(8)]
    (directory / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = directory / "sums.yaml"
    card.write_text(
        f"name: sums\nprompts: {{kind: file, path: {directory}/sums.jsonl}}\nproblems: 8\nsamples: 2\n"
        'prompt_suffix: "\\n\\nBox it."\npublished:\n  Somebody: {pass@1: 55, cons@64: 60}\n'
    )
    return card


def scores(directory, benchmark="sums", model="scripted"):
    """The scores of a finished evaluation."""
    return read_results(directory / benchmark / model).scores


def right(question, seed):
    n = int(question.split()[2])
    return (f"twice {n}", f"So it is \\boxed{{{2 * n}}}."), "stop"
