"""What a model hub answers, from a server on this machine: each refusal is one reason with a way out."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from server_support import listening

# owner of the repository → status, error code, body
ANSWERS: dict[str, tuple[int, str | None, bytes]] = {
    "gated": (403, "GatedRepo", b"{}"),
    "private": (401, "RepoNotFound", b"{}"),
    "missing": (404, "RepoNotFound", b"{}"),
    "moved": (404, "RevisionNotFound", b"{}"),
    "forbidden": (403, None, b'{"error": "your token lacks a permission"}'),
    "text": (200, None, b"<html>log in</html>"),
    "list": (200, None, b"[1]"),
    "empty": (200, None, b"{}"),
    "failing": (500, None, b""),
}
CODE = """
import json, sys
from distill.model_files import download
for repo in json.loads(sys.argv[1]):
    print(json.dumps([repo, str(download(repo, "v1"))]))
"""


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        owner = next((name for name in ANSWERS if f"/{name}/" in self.path), "missing")
        status, code, body = ANSWERS[owner]
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    with listening(Hub) as server:
        yield f"http://127.0.0.1:{server.server_port}"


def test_every_refusal_of_the_hub_is_one_reason(endpoint: str, tmp_path: object) -> None:
    repos = [f"{owner}/model" for owner in ANSWERS] + ["a--b/c", "no-such/model"]
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(repos)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reasons = dict(json.loads(line) for line in done.stdout.splitlines())
    assert "accept its licence on the hub" in reasons["gated/model"]
    for repo in ("private/model", "missing/model", "no-such/model"):
        assert "the hub has no such model, or it is private" in reasons[repo]
    assert reasons["moved/model"] == "the hub has no revision v1 of it: check `revision`"
    assert "your token lacks a permission" in reasons["forbidden/model"]
    for repo in ("text/model", "list/model", "empty/model"):
        assert reasons[repo] == "its answer is not that of a model hub: check the network and HF_ENDPOINT"
    assert "500" in reasons["failing/model"]
    assert "not a valid hub id" in reasons["a--b/c"]
    assert all(reason and "\n" not in reason for reason in reasons.values())
