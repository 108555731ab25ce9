"""`distill eval --model`: one model without a recipe, on a server that follows a script; also on files of real data."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from distill import catalog
from distill.backends import Completed, Job, Sampling
from distill.backends.remote import RemoteBackend
from distill.cli import main
from distill.errors import WorkError
from distill.grading.math import gold_answer
from distill.prompts import Prompt


class Script(BaseHTTPRequestHandler):
    """Answers chat requests as `reply(question, seed)` says: (text, finish reason), or an HTTP status."""

    def do_GET(self):
        self.send_json(
            {"object": "list", "data": [{"id": "scripted", "object": "model", "created": 0, "owned_by": ""}]}
        )

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        made = self.server.reply(asked["messages"][-1]["content"], asked["seed"])
        if isinstance(made, int):
            self.send_json({"error": {"message": "scripted"}}, made)
            return
        text, finish = made
        message = {"role": "assistant", "content": text}
        if isinstance(text, tuple):
            message = {"role": "assistant", "reasoning_content": text[0], "content": text[1]}
        self.send_json(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "scripted",
                "choices": [{"index": 0, "finish_reason": finish, "message": message}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 7 if text else 0, "total_tokens": 8},
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
def server(reply) -> Iterator[ThreadingHTTPServer]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    made.reply, made.asked = reply, []
    made.handle_error = lambda *_: None  # of clients that hang up
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def url(made) -> str:
    return f"http://127.0.0.1:{made.server_address[1]}/v1"


def distill(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["distill", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.fixture
def sums(tmp_path):
    """A card of a benchmark with eight problems."""
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = tmp_path / "sums.yaml"
    card.write_text(
        f"name: sums\nprompts: {{kind: file, path: {tmp_path}/sums.jsonl}}\nproblems: 8\nsamples: 2\n"
        'prompt_suffix: "\\n\\nBox it."\npublished:\n  Somebody: {pass@1: 55, cons@64: 60}\n'
    )
    return card


def scores(directory, benchmark="sums", model="scripted"):
    return json.loads((directory / benchmark / model / "scores.json").read_text())


def right(question, seed):
    n = int(question.split()[2])
    return (f"twice {n}", f"So it is \\boxed{{{2 * n}}}."), "stop"


def test_a_server_is_scored(sums, tmp_path, monkeypatch, capsys):
    with server(right) as made:
        asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked, "--published", "Somebody") == 0
        assert len(made.asked) == 16 and len({a["seed"] for a in made.asked}) == 16
        assert made.asked[0]["messages"][-1]["content"].endswith("?\n\nBox it.")
        row = scores(tmp_path / "out")
        assert row["pass@1"] == 1 and row["no_answer_rate"] == 0 and row["truncated_rate"] == 0
        assert row["mean_completion_tokens"] == 7
        assert (row["median_reasoning_tokens"], row["reasoning_counted_in"]) == (2, "words")
        assert row["pass@k"]["2"]["value"] == row["cons@k"]["2"]["value"] == 1
        assert "published for Somebody: pass@1 55.0%, outside the interval of scripted, cons@64 60.0%" in (
            capsys.readouterr().out
        )
        assert distill(monkeypatch, *asked, "--samples", 3) == 0, "more samples extend it"
        assert len(made.asked) == 24
        assert distill(monkeypatch, *asked, "--set", "max_new_tokens=99") == 2
        assert "drawn with other settings (sampling.max_new_tokens: 32768 → 99)" in capsys.readouterr().err


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
    assert scores(tmp_path / "out")["pass@1"] == 1


def test_an_empty_answer_is_asked_again(sums, tmp_path, monkeypatch, capsys):
    """Under load some servers answer nothing, with the status of success; that is no answer of the model."""
    monkeypatch.setattr("distill.backends.remote.FIRST_PAUSE", 0.01)
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
    assert scores(tmp_path / "out")["pass@1"] == 1
    with server(lambda question, seed: ("", "stop")) as made:
        assert distill(monkeypatch, *command[:2], url(made), *command[3:-1], tmp_path / "none") == 1
    assert "the server failed: its answers are empty" in capsys.readouterr().err


def test_what_ended_beside_a_failure_is_kept():
    """Ten samples end at once, the first of them with a failure: the nine are yielded before it is raised."""

    class Failing(RemoteBackend):
        async def _sample(self, client, prompt, sample, sampling, seed):
            if sample == 0:
                raise WorkError("down")
            return Completed(prompt, sample, "x", "stop", (), ())

    kept = []
    with pytest.raises(WorkError, match="down"):
        job = Job(Prompt.from_question("q", "1"), tuple(range(10)))
        for done in Failing("http://127.0.0.1:9/v1", "m", 10).complete([job], Sampling(), 0):
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
    assert process.returncode == 130 and "interrupted; rerun the same command to resume" in error
    assert ledger.read_bytes().count(b"\n") == 8 and "Traceback" not in error


def test_cut_off_reasoning_is_truncated_and_no_answer(sums, tmp_path, monkeypatch):
    with server(lambda question, seed: (("and so on and", ""), "length")) as made:
        assert distill(monkeypatch, "eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out") == 0
    row = scores(tmp_path / "out")
    assert row["truncated_rate"] == row["no_answer_rate"] == row["unverifiable_rate"] == 1 and row["pass@1"] == 0
    assert row["cons@k"]["2"]["silent"] == 8


def test_votes_count_equal_answers_together(sums, tmp_path, monkeypatch):
    """Of four samples of a problem two are right, spelled in two ways, and two wrong, in two ways that differ."""
    turn: dict[str, int] = {}

    def four(question, seed):
        n = int(question.split()[2])
        turn[question] = turn.get(question, -1) + 1
        spelled = [str(2 * n), f"\\frac{{{4 * n}}}{{2}}", str(2 * n + 1), str(2 * n + 3)]
        return f"\\boxed{{{spelled[turn[question]]}}}", "stop"

    with server(four) as made:
        asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out", "--samples", 4]
        assert distill(monkeypatch, *asked) == 0
    row = scores(tmp_path / "out")
    assert row["pass@1"] == 0.5 and row["cons@k"]["4"]["value"] == 1 and row["cons@k"]["4"]["ties"] == 0
    assert row["pass@k"]["2"]["value"] == pytest.approx(5 / 6)


def test_two_evaluations_are_compared(sums, tmp_path, monkeypatch, capsys):
    for name, reply in (
        ("a", right),
        ("b", lambda q, seed: right(q, seed) if int(q.split()[2]) < 6 else ("no", "stop")),
    ):
        with server(reply) as made:
            asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / name]
            assert distill(monkeypatch, *asked) == 0
    capsys.readouterr()
    made = tmp_path / "made.json"
    assert distill(monkeypatch, "eval", "compare", tmp_path / "a", tmp_path / "b", "--json", made) == 0
    printed = capsys.readouterr().out
    (row,) = json.loads(made.read_text())
    assert row["difference"] == 0.25 and len(row["gained"]) == 2 and row["lost"] == []
    assert "What is 7 + 7?" in printed and "+25.0" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "give a recipe, or --model with --benchmark and --out"),
        (["--model", "nowhere", "--benchmark", "SUMS", "--out", "OUT"], "nowhere: no such model directory"),
        (["--model", "http://127.0.0.1:9/v1", "--benchmark", "SUMS", "--out", "OUT"], "no model server answers there"),
        (["--model", "x", "--out", "OUT"], "(--benchmark missing)"),
        (["tiny", "--model", "x"], "give either RECIPE or --model"),
        (["tiny", "--samples", "2"], "--samples goes with --model and without a recipe"),
        (
            ["--model", "x", "--benchmark", "humaneval", "--out", "OUT"],
            "benchmark humaneval: task 'code' has no grader",
        ),
        (["--model", "x", "--benchmark", "SUMS", "--out", "OUT", "--published", "Nobody"], "there are Somebody"),
        (["--model", "x", "--benchmark", "SUMS", "--out", "OUT", "--source", "sums"], "write it as NAME=FILE"),
        (["--model", "x", "--benchmark", "SUMS", "--out", "OUT", "--source", "more=x.jsonl"], "more is not evaluated"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, sums, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"SUMS": str(sums), "OUT": "out"}
    assert distill(monkeypatch, "eval", *(places.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists(), "nothing is left half-written"


def test_a_name_stays_below_the_directory(sums, tmp_path, monkeypatch, capsys):
    base = catalog.folder("student") / "tiny-qwen"
    for name in ("../../escaped", "a/b", ".hidden"):
        asked = ["eval", "--model", base, "--benchmark", sums, "--out", tmp_path / "out", "--name", name]
        assert distill(monkeypatch, *asked) == 2 and "a directory is called so" in capsys.readouterr().err
    assert not (tmp_path / "escaped").exists()


def test_settings_may_change_until_something_is_drawn(sums, tmp_path, monkeypatch, capsys):
    """A server that refuses the first request leaves no samples, and so nothing that others could be mixed with."""
    made: list[int] = [400]
    with server(lambda question, seed: made[0] if made[0] == 400 else right(question, seed)) as one:
        asked = ["eval", "--model", url(one), "--benchmark", sums, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked) == 2 and "lower max_new_tokens" in capsys.readouterr().err
        made[0] = 200
        assert distill(monkeypatch, *asked, "--set", "max_new_tokens=64") == 0
        assert distill(monkeypatch, *asked) == 2
        assert "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("reply", [b'{"choices": [{"mess', b"<html>gateway</html>"])
def test_replies_that_cannot_be_read_are_a_failure_of_the_server(reply, sums, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distill.backends.remote.FIRST_PAUSE", 0.01)
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


def test_problems_without_an_answer_are_refused(sums, tmp_path, monkeypatch, capsys):
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n) if n else None} for n in range(8)]
    (tmp_path / "holes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with server(right) as made:
        asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked, "--source", f"sums={tmp_path}/holes.jsonl") == 2
        assert "1 of its problems have no answer to compare with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("settings.json", "{", "settings.json: damaged"),
        ("grades.jsonl", "{}\n", "grades.jsonl: damaged"),
        ("scores.json", "[]", "scores.json: damaged"),
        ("scores.json", '{"pass@1": "abc"}', "scores.json: damaged"),
    ],
)
def test_damaged_files_are_named(file, content, message, sums, tmp_path, monkeypatch, capsys):
    with server(right) as made:
        asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked) == 0
        (tmp_path / "out" / "sums" / "scripted" / file).write_text(content)
        again = ["eval", "compare", tmp_path / "out", tmp_path / "out"] if file == "scores.json" else asked
        assert distill(monkeypatch, *again) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_file_may_move_and_grow(sums, tmp_path, monkeypatch):
    rows = [json.dumps({"question": f"What is {n} + {n}?", "answer": str(2 * n)}) + "\n" for n in range(8)]
    for name, count in (("few.jsonl", 3), ("more.jsonl", 8)):
        (tmp_path / name).write_text("".join(rows[:count]))
    with server(right) as made:
        asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked, "--limit", 3, "--source", f"sums={tmp_path}/few.jsonl") == 0
        assert distill(monkeypatch, *asked, "--source", f"sums={tmp_path}/more.jsonl") == 0
        assert len(made.asked) == 16, "what was answered is not asked again"
    assert scores(tmp_path / "out")["source"]["path"] == str(tmp_path / "more.jsonl")


def test_a_card_is_checked_with_its_file(sums, tmp_path, monkeypatch, capsys):
    assert distill(monkeypatch, "benchmarks", "check", sums) == 0
    (tmp_path / "sums.jsonl").unlink()
    assert distill(monkeypatch, "benchmarks", "check", sums) == 2 and "sums.jsonl" in capsys.readouterr().err


def test_another_number_of_problems_is_refused(sums, tmp_path, monkeypatch, capsys):
    (tmp_path / "fewer.jsonl").write_text(json.dumps({"problem": "What is 1 + 1?", "answer": "2"}) + "\n")
    with server(right) as made:
        asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked, "--source", f"sums={tmp_path}/fewer.jsonl") == 2
        assert "has 1 problems where its card says 8" in capsys.readouterr().err
        assert distill(monkeypatch, *asked, "--source", f"sums={tmp_path}/fewer.jsonl", "--limit", 1) == 0


def test_tokens_that_nobody_counted_are_not_none(sums, tmp_path, monkeypatch, capsys):
    def without(self, content, status=200):
        content.pop("usage", None)
        whole(self, content, status)

    whole = Script.send_json
    monkeypatch.setattr(Script, "send_json", without)
    with server(right) as made:
        assert distill(monkeypatch, "eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out") == 0
    assert scores(tmp_path / "out")["mean_completion_tokens"] is None and "–" in capsys.readouterr().out


REAL = {
    "gsm8k": ("gsm8k/test.jsonl", 1319),
    "math-500": ("math500/test.jsonl", 500),
    "aime-2024": ("aime24_with_solutions/test.jsonl", 30),
    "aime-2025": ("aime24_25_prompts/aime25.jsonl", 30),
    "amc-2023": ("amc23/test.jsonl", 40),
}


@pytest.mark.parametrize("benchmark", REAL)
@pytest.mark.parametrize("kind", ["reference", "cut off"])
def test_real_benchmarks_with_a_scripted_server(benchmark, kind, real_data, tmp_path, monkeypatch):
    """The reference answers are all correct, before any parser; text that is cut off is truncated, all of it."""
    file, count = REAL[benchmark]
    path = real_data(file)
    gold = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = next(row[name] for name in ("problem", "question", "prompt") if name in row)
        gold[question.strip()] = gold_answer(str(row["answer"]))
    monkeypatch.setattr("distill.grading.grader.WorkerPool.map", refuse) if kind == "reference" else None

    def reply(question, seed):
        if kind == "cut off":
            return "Let us think about", "length"
        found = next((known for known in gold if question.startswith(known)), None)
        return f"<think>\nhm\n</think>\nThe answer is \\boxed{{{gold[found]}}}.", "stop"

    with server(reply) as made:
        asked = ["eval", "--model", url(made), "--benchmark", benchmark, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked, "--samples", 1, "--source", f"{benchmark}={path}") == 0
        assert all(a["messages"][-1]["content"].count("Please reason step by step") == 1 for a in made.asked)
    row = scores(tmp_path / "out", benchmark)
    assert row["problems"] == count
    if kind == "reference":
        assert row["pass@1"] == 1 and row["unverifiable_rate"] == 0
    else:
        assert row["truncated_rate"] == 1 and row["pass@1"] == 0


def refuse(pool, items):
    """In place of the workers: nothing may come to them."""
    assert not list(items), "an identical answer was sent to a parser"
    return iter(())
