"""A stand-in for a model server on the loopback address, which answers as a test says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from distill import backends
from distill.backends import Backend, Completed, Job, SamplingParams
from distill.models import Model, Server
from distill.prompts import Prompt
from distill.recipe import LocalEngine

KEY = "sk-a+b/C&d=0123456789"
PARAMS = SamplingParams(temperature=0.6, max_new_tokens=64)
JSON = "application/json"

Answer = tuple[int, str, bytes]  # status, content type, body


def chat(**choice: object) -> dict[str, object]:
    """A chat completion whose only choice has these fields."""
    message = {"role": "assistant", "content": "So it is \\boxed{4}.", "reasoning_content": "twice two"}
    whole = {"index": 0, "finish_reason": "stop", "message": message}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [whole | choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10},
    }


def body(reply: object) -> bytes:
    return json.dumps(reply).encode()


class Handler(BaseHTTPRequestHandler):
    """Answers a chat request with what `server.reply(number, request)` gives."""

    def do_GET(self) -> None:
        self.send(*self.server.models)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(asked)
        self.send(*self.server.reply(number, self))

    def send(self, status: int, content_type: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


class Listening(ThreadingHTTPServer):
    request_queue_size = 256  # connections that arrive together; beyond, the kernel resets them

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are no error."""


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler], **attributes: object) -> Iterator[Listening]:
    """A server on a free port of the loopback address. attributes: of the server, for its handler."""
    made = Listening(("127.0.0.1", 0), handler)
    vars(made).update(attributes)
    thread = threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


@contextmanager
def server(reply: Callable[[int, Handler], Answer], models: Answer | None = None) -> Iterator[Listening]:
    models = models or (200, JSON, body({"object": "list", "data": [{"id": "m"}]}))
    with listening(Handler, reply=reply, models=models, asked=[], lock=threading.Lock()) as made:
        yield made


def opened(made: Listening, max_batch: int = 4, key: str | None = KEY, name: str | None = None):
    url = f"http://127.0.0.1:{made.server_address[1]}/v1"
    return backends.open(Model("m", Server(url, name, key)), LocalEngine(), max_batch)


def complete(backend: Backend, samples: int = 1) -> list[Completed]:
    return list(backend.complete([Job(Prompt.from_question("2 + 2?", "4"), tuple(range(samples)))], PARAMS, 0))
