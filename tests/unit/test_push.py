"""`distill push` against a hub on this machine: what arrives, what is resumed, and every refusal as one line."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from report_support import make_run

from distill.integrity import record_files
from distill.record import Identity, StageRecord

TOKEN = "hf_not_for_any_log"


class Hub(ThreadingHTTPServer):
    """Repositories in memory. failing: how many uploads of large files end in status 500, after the first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.failing, self.status, self.puts, self.tokens = False, 200, 0, set[str]()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        if self.headers.get("Authorization"):
            self.server.tokens.add(self.headers["Authorization"])
        if self.server.status != 200:
            return self.answer({"error": "said no"}, self.server.status)
        if self.path.startswith("/api/whoami"):
            return self.answer({"name": "me", "type": "user"})
        if match := re.fullmatch(r"/(?:datasets/)?(me/[\w-]+)/resolve/main/distill\.json", self.path):
            content = self.server.repositories[match[1]]["distill.json"]
            return self.answer(content, ETag='"1"', X_Repo_Commit="1" * 40)
        match = re.match(r"/api/(?:datasets|models)/(me/[\w-]+)", self.path)
        if match is None or match[1] not in self.server.repositories:
            return self.answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        names = [{"rfilename": name} for name in self.server.repositories[match[1]]]
        self.answer({"id": match[1], "sha": "1" * 40, "siblings": names, "private": False, "tags": [], "downloads": 0})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            kind = "datasets/" if asked.get("type") == "dataset" else ""
            url = f"http://127.0.0.1:{self.server.server_port}/{kind}{name}"
            if name in self.server.repositories:
                return self.answer({"error": "it exists", "url": url}, 409)
            self.server.repositories[name] = {".gitattributes": b""}
            self.server.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return self.answer({"url": url, "name": name})
        repository = re.search(r"me/[\w-]+?(?=\.git|/)", self.path)
        assert repository, self.path
        host = f"http://127.0.0.1:{self.server.server_port}"
        kind = "datasets/" if "/datasets/" in self.path else ""
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects: list[Any] = json.loads(body)["objects"]
            for item in objects:
                if item["oid"] not in self.server.blobs:
                    item["actions"] = {"upload": {"href": f"{host}/put/{item['oid']}"}}
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "deletedFile":
                    del self.server.repositories[repository[0]][value["path"]]
                    continue
                content = (
                    base64.b64decode(value["content"]) if line["key"] == "file" else self.server.blobs[value["oid"]]
                )
                self.server.repositories[repository[0]][value["path"]] = content
            return self.answer({"commitUrl": f"{host}/{kind}{repository[0]}/commit/1", "commitOid": "1" * 40})
        return self.answer({})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.puts += 1
        if self.server.failing and self.server.blobs:
            return self.answer({"error": "out of order"}, 400)
        self.server.blobs[self.path.rpartition("/")[2]] = body
        self.answer(b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


def mode(path: str) -> str:
    return "lfs" if path.endswith((".parquet", ".safetensors")) else "regular"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Push = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def push(hub: Hub, tmp_path: Path) -> Push:
    def call(*arguments: object, token: str | None = TOKEN, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | changes
        if token is not None:
            environment["HF_TOKEN"] = token
        code = "from distill.command import main; main()"
        words = [sys.executable, "-c", code, "push", *map(str, arguments)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=120)
        assert TOKEN not in done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, whose student has a card and weights."""
    directory = tmp_path / "run"
    make_run(directory, upto="train", traces=20)
    student = directory / "student"
    student.mkdir(exist_ok=True)
    (student / "config.json").write_text("{}")
    (student / "README.md").write_text("---\nlicense: mit\n---\n# student\n")
    (student / "model.safetensors").write_bytes(b"weights")
    return directory


def test_data_set_and_student_arrive_with_their_cards(push: Push, hub: Hub, run: Path, tmp_path: Path) -> None:
    done = push(run, "--dataset", "me/traces", "--model", "me/student", "--private")
    assert done.returncode == 0, done.stderr
    assert hub.private == {"me/traces": True, "me/student": True} and hub.tokens == {f"Bearer {TOKEN}"}
    traces = hub.repositories["me/traces"]
    front = yaml.safe_load(traces["README.md"].decode().split("---")[1])
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    part = tmp_path / "part.parquet"
    part.write_bytes(traces["data/part-00000.parquet"])
    assert part.read_bytes() == (run / "filtered/kept/part-00000.parquet").read_bytes()
    assert f"{pq.read_metadata(part).num_rows:,} reasoning traces of `tiny-r1`" in traces["README.md"].decode()
    student = hub.repositories["me/student"]
    assert student["model.safetensors"] == b"weights" and b"license: mit" in student["README.md"]
    assert str(tmp_path).encode() not in b"".join([*traces.values(), *student.values()])
    assert push(run, "--dataset", "me/traces").returncode == 0  # the same run again


@pytest.mark.slow
def test_a_second_push_deletes_what_the_run_no_longer_has(push: Push, hub: Hub, run: Path) -> None:
    (run / "student" / "adapter_model.safetensors").write_bytes(b"adapter")
    assert push(run, "--dataset", "me/traces", "--model", "me/student").returncode == 0
    hub.repositories["me/traces"] |= {"data/part-00001.parquet": b"old", "notes.md": b"theirs"}
    (run / "student" / "adapter_model.safetensors").unlink()
    assert push(run, "--dataset", "me/traces", "--model", "me/student").returncode == 0
    traces, student = hub.repositories["me/traces"], hub.repositories["me/student"]
    assert "data/part-00001.parquet" not in traces and "notes.md" in traces and "data/part-00000.parquet" in traces
    assert "adapter_model.safetensors" not in student and student["model.safetensors"] == b"weights"


@pytest.mark.slow
def test_another_run_of_the_same_recipe_is_something_else(push: Push, hub: Hub, run: Path) -> None:
    assert push(run, "--dataset", "me/traces").returncode == 0
    path = run / "run.json"
    Identity.read(path, "").model_copy(update={"created": "2026-04-01"}).write(path)
    done = push(run, "--dataset", "me/traces")
    assert done.returncode == 2 and "holds something else already" in done.stderr


def test_a_push_that_failed_resumes_with_what_is_missing(push: Push, hub: Hub, run: Path) -> None:
    (run / "student" / "more.safetensors").write_bytes(b"more")
    hub.failing = True
    done = push(run, "--model", "me/student")
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1, done.stderr
    assert "model.safetensors" not in hub.repositories["me/student"] and len(hub.blobs) == 1
    hub.failing, before = False, hub.puts
    assert push(run, "--model", "me/student").returncode == 0
    assert hub.puts == before + 1 and hub.repositories["me/student"]["more.safetensors"] == b"more"


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, 2, "the hub rejected the token; set HF_TOKEN to a valid one"),
        (403, 2, "the token may not write here"),
        (503, 1, "rerun the same command"),
    ],
)
def test_refusals_of_the_hub(push: Push, hub: Hub, run: Path, status: int, code: int, message: str) -> None:
    hub.status = status
    done = push(run, "--dataset", "me/traces")
    assert done.returncode == code and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not hub.repositories


@pytest.mark.slow
def test_refusals_before_anything_is_sent(push: Push, hub: Hub, run: Path) -> None:
    def refused(message: str, *arguments: object, code: int = 2, **options: Any) -> None:
        done = push(*arguments, **options)
        assert done.returncode == code and message in done.stderr and done.stderr.count("\n") == 1, done.stderr

    refused("no token for the hub: set HF_TOKEN", run, "--dataset", "me/traces", token=None)
    refused("HF_HUB_OFFLINE is set", run, "--dataset", "me/traces", HF_HUB_OFFLINE="1")
    refused("nothing to push", run)
    refused("write it as USER/NAME", run, "--dataset", "traces")
    refused("is not a run directory", run / "student", "--dataset", "me/traces")
    refused("cannot reach the hub", run, "--dataset", "me/traces", code=1, HF_ENDPOINT="http://127.0.0.1:9")
    hub.repositories["me/theirs"] = {"data/train.parquet": b""}
    refused("holds something else already", run, "--dataset", "me/theirs")
    (run / "student/README.md").unlink()
    refused("README.md: no such file", run, "--dataset", "me/traces", "--model", "me/student")
    record = run / "stages/filter.json"
    read = StageRecord.read(record, "")
    files = record_files(run, sorted(run.glob("filtered/*/*.parquet")))
    read.model_copy(update={"files": files}).write(record)
    part = next(iter(run.glob("filtered/kept/*.parquet")))
    part.write_bytes(part.read_bytes()[:-1])
    refused("with this recipe recreates it", run, "--dataset", "me/traces")
    read.model_copy(update={"finished": None, "summary": None}).write(record)
    refused("the stage filter is not finished", run, "--dataset", "me/traces")
    assert hub.repositories.keys() == {"me/theirs"}
