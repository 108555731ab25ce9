"""Servers that fail in the middle of an evaluation: what is kept, what is asked again, what the user reads."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from eval_support import Script, distill, right, scores, server, sums, url

from distill.backends import Job, SamplingParams
from distill.backends.answers import completed
from distill.backends.remote import RemoteBackend
from distill.backends.reply import Reply
from distill.errors import WorkError
from distill.models import Server
from distill.prompts import Prompt

__all__ = ["sums"]


def test_what_is_missing_is_asked_again_after_a_failure(sums, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distill.backends.remote.RETRIES", 0)
    calls = []

    def fails_once(question, seed):
        calls.append(seed)
        return 500 if len(calls) == 9 else right(question, seed)

    with server(fails_once) as made:
        asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out", "--set", "max_batch=1"]
        assert distill(monkeypatch, *asked) == 1
        assert "the server failed" in capsys.readouterr().err
        assert distill(monkeypatch, *asked) == 0
        assert len(calls) == 17, "eight were kept, one failed, eight were drawn in the end"
    assert scores(tmp_path / "out").pass_at_1.value == 1


def test_an_empty_answer_is_asked_again(sums, tmp_path, monkeypatch, capsys):
    """Under load some servers answer nothing, with the status of success; that is no answer of the model."""
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("distill.backends.remote.RETRIES", 2)
    asked = Counter()

    def at_the_third_time(question, seed):
        asked[seed] += 1
        return (
            [("", "stop"), ("So it", "insufficient_system_resource")][asked[seed] - 1]
            if asked[seed] < 3
            else right(question, seed)
        )

    with server(at_the_third_time) as made:
        command = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *command) == 0 and set(asked.values()) == {3}
    assert scores(tmp_path / "out").pass_at_1.value == 1
    with server(lambda question, seed: ("", "stop")) as made:
        assert distill(monkeypatch, *command[:2], url(made), *command[3:-1], tmp_path / "none") == 1
    assert "the server failed: its answers are empty" in capsys.readouterr().err


def test_what_ended_beside_a_failure_is_kept():
    """Ten samples end at once, the first of them with a failure: the nine are yielded before it is raised."""

    class Failing(RemoteBackend):
        async def _request(self, prompt, samples, work):
            if samples == (0,):
                raise WorkError("down")
            return [completed(prompt, samples[0], Reply("x", "stop", None, None), ())]

    kept = []
    with pytest.raises(WorkError, match="down"):
        job = Job(Prompt.from_question("q", "1"), tuple(range(10)))
        for done in Failing(Server("http://127.0.0.1:9/v1", "m"), 10).complete([job], SamplingParams(), 0):
            kept.append(done.sample)
    assert sorted(kept) == list(range(1, 10))


def test_an_interruption_does_not_wait_for_the_server(sums, tmp_path):
    """Half of the samples are answered, the others never; Ctrl-C ends at once, and what was answered is kept."""
    wait = threading.Event()

    def half(question, seed):
        if int(question.split()[2]) % 2:
            wait.wait()
        return right(question, seed)

    ledger = tmp_path / "out" / "sums" / "scripted" / "traces" / "ledger.jsonl"
    with server(half) as made:
        command = [sys.executable, "-m", "distill.command", "eval", "--model", url(made), "--benchmark", str(sums)]
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            while not (ledger.exists() and ledger.read_bytes().count(b"\n") == 8):
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)  # the server would have kept it for ever
        finally:
            process.kill()
            wait.set()
    assert process.returncode == 130 and (
        re.search(
            r"interrupted \(eval sums/scripted: [78]/16 samples are kept\); rerun the same command to resume", error
        )
    )  # the eighth may be stored and not yet counted
    assert ledger.read_bytes().count(b"\n") == 8 and "Traceback" not in error


@pytest.mark.parametrize("reply", [b'{"choices": [{"mess', b"<html>gateway</html>"])
def test_replies_that_cannot_be_read_are_a_failure_of_the_server(reply, sums, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("distill.backends.remote.RETRIES", 1)
    with server(right) as made:
        monkeypatch.setattr(Script, "send_json", unreadable(reply))
        assert distill(monkeypatch, "eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "empty or unreadable" in error and error.count("\n") == 1


def unreadable(reply):
    whole = Script.send_json

    def send(self, content, status=200):
        if content["object"] == "list":
            whole(self, content, status)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json" if reply.startswith(b"{") else "text/html")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    return send


def test_a_server_that_wants_a_key_says_where_to_put_it(sums, tmp_path, monkeypatch, capsys):
    with server(lambda question, seed: 401) as made:
        assert distill(monkeypatch, "eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out") == 2
    assert "set OPENAI_API_KEY" in capsys.readouterr().err
