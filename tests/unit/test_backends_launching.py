"""A server that distill starts: its flags, its end on every way out, and the messages when it fails."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from eval_support import distill
from server_support import listening

from distill import catalog, generate
from distill.artefacts import GenerateSummary
from distill.backends import launching
from distill.backends.serving import ENGINES, Flags, Installed, command, parallel_size, reasoning_parser
from distill.config import parse
from distill.errors import UserError
from distill.hardware import gpu_count
from distill.planned import Plan
from distill.recipe import LaunchedServer, Recipe
from distill.run import Run
from distill.traces.store import TraceStore

REPO = Path(__file__).resolve().parents[2]
TEMPLATE = (REPO / "teachers/tiny-r1/chat_template.jinja").read_text()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with the commands `vllm` and `sglang` on PATH; the ids of their processes are in `pids`."""
    for name in ("vllm", "sglang"):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!{sys.executable}\n" + (REPO / "tests/stand_in_server.py").read_text())
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("STAND_IN_PIDS", str(tmp_path / "pids"))
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe(server=None, **changes):
    content = {
        "name": "launched",
        "teacher": "tiny-r1",
        "student": "tiny-qwen",
        "server": {"launch": "vllm"} | (server or {}),
        "prompts": [{"kind": "file", "path": "sums.jsonl"}],
        "generate": {"sampling": {"max_new_tokens": 64}, "max_batch": 2},
        "eval": {"benchmarks": ["tiny-arithmetic"]},
    }
    Path("launched.yaml").write_text(yaml.safe_dump(content | changes))
    return "launched.yaml"


def processes():
    return [int(line) for line in Path("pids").read_text().split()] if Path("pids").exists() else []


def none_is_left(seconds=30.0):
    deadline = time.monotonic() + seconds
    while any(_runs(pid) for pid in processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return processes() and not any(_runs(pid) for pid in processes())


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stored():
    return len(TraceStore(Path("runs/launched/traces")))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_it_starts_answers_and_leaves_no_process_and_no_key(here, monkeypatch, capsys, engine):
    server = {"launch": engine, "arguments": ["--enforce-eager"]}
    assert distill(monkeypatch, "generate", recipe(server)) == 0
    traces = list(TraceStore(Path("runs/launched/traces")))
    assert len(traces) == 8 and {trace.reasoning for trace in traces} == {"twice two"}
    assert len(processes()) == 2 and none_is_left()
    log = Path("runs/launched/logs/server.log").read_text()
    assert "--enforce-eager" in log and "loading with key ***" in log
    assert f"--served-model-name teacher --{'tp-size' if engine == 'sglang' else 'tensor-parallel-size'} 1" in log
    assert "--reasoning-parser deepseek" in log
    capsys.readouterr()
    assert distill(monkeypatch, "generate", "launched.yaml") == 0 and len(processes()) == 2  # nothing to do
    assert distill(monkeypatch, "generate", recipe(server | {"arguments": []})) == 2
    assert "teacher.arguments" in capsys.readouterr().err


def python_with(engine, directory):
    """A command `python3` that has an engine: the stand-in as its module, and its metadata."""
    module = {"vllm": "vllm/entrypoints/cli/main.py", "sglang": "sglang/launch_server.py"}[engine]
    packages = directory / "other" / "packages"
    (packages / module).parent.mkdir(parents=True)
    (packages / module).write_text((REPO / "tests/stand_in_server.py").read_text())
    (packages / f"{engine}-9.8.7.dist-info").mkdir()
    (packages / f"{engine}-9.8.7.dist-info/METADATA").write_text(f"Name: {engine}\nVersion: 9.8.7\n")
    python = directory / "other" / "python3"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_of_another_python_is_started_by_its_module(here, monkeypatch, engine):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    python = python_with(engine, here)
    assert distill(monkeypatch, "generate", recipe({"launch": engine, "executable": str(python)})) == 0
    assert stored() == 8 and len(processes()) == 2 and none_is_left()
    module = {"vllm": "-m vllm.entrypoints.cli.main serve", "sglang": "-m sglang.launch_server --model-path"}[engine]
    assert f"{python} {module} " in Path("runs/launched/logs/server.log").read_text()
    summary = json.loads(Path("runs/launched/stages/generate.json").read_text())["summary"]
    assert summary["numerics"] == {"kernels": f"{engine} 9.8.7"}


@pytest.mark.parametrize(
    "first_lines",
    ["#!{python}\n", "#!/usr/bin/env {python}\n", "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n"],
)
def test_the_version_is_that_of_the_commands_python(tmp_path, first_lines):
    python = python_with("vllm", tmp_path)
    script = tmp_path / "vllm"
    script.write_text(first_lines.format(python=python))
    script.chmod(0o755)
    installed = Installed.find(LaunchedServer(launch="vllm", executable=str(script)))
    assert installed.version == "9.8.7" and installed.start == (str(script), "serve")
    script.write_text("#!/bin/sh\nexec docker run vllm\n")
    assert Installed.find(LaunchedServer(launch="vllm", executable=str(script))).version is None


def test_the_teacher_is_scored_through_one_server_whatever_its_benchmarks_need(here, monkeypatch):
    for name, tokens in (("short", 64), ("long", 192)):
        card = yaml.safe_load((REPO / "benchmarks/tiny-arithmetic.yaml").read_text())
        card["name"], card["prompts"]["limit"], card["sampling"]["max_new_tokens"] = name, 3, tokens
        Path(f"{name}.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.setattr(launching, "CONTEXT_STEP", 1)
    benchmarks = {"benchmarks": ["./short.yaml", "./long.yaml"], "models": ["teacher"]}
    assert distill(monkeypatch, "eval", recipe(eval=benchmarks)) == 0
    assert Path("runs/launched/logs/server.log").read_text().count("loading with key") == 1
    assert len(processes()) == 2 and none_is_left()
    for name in ("short", "long"):
        scores = json.loads(Path(f"runs/launched/eval/{name}/teacher/scores.json").read_text())
        assert scores["problems"] == 3 and scores["mean_completion_tokens"] == 7
    assert distill(monkeypatch, "eval", "launched.yaml") == 0 and len(processes()) == 2  # nothing to do


@pytest.fixture
def proxy(monkeypatch):
    """The proxy of the environment, which refuses every request; the addresses that were requested from it."""
    requested = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            self.send_error(403)

        do_POST = do_CONNECT = do_GET

        def log_message(self, *args):
            pass

    with listening(Handler) as server:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
            monkeypatch.delenv(name.lower(), raising=False)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield requested


def test_requests_to_a_launched_server_bypass_the_proxy(here, monkeypatch, proxy):
    assert distill(monkeypatch, "generate", recipe()) == 0
    assert stored() == 8 and not proxy and none_is_left()


def test_requests_to_an_address_of_the_user_go_through_the_proxy(here, monkeypatch, proxy):
    content = yaml.safe_load(Path(recipe()).read_text())
    content["server"] = {"url": "http://model.invalid/v1", "model": "m"}
    Path("launched.yaml").write_text(yaml.safe_dump(content))
    assert distill(monkeypatch, "generate", "launched.yaml") == 2
    assert proxy and set(proxy) == {"http://model.invalid/v1/models"}


@pytest.mark.parametrize(("engine", "flags"), [("vllm", set()), ("sglang", {"--enable-strict-thinking"})])
def test_a_thinking_budget_is_enforced_by_the_server(engine, flags):
    installed = Installed(ENGINES[engine], (engine, "serve"), None)
    values = Flags("teacher", port=1, context=4096, parallel=1, parser="deepseek-r1", budget=True)
    settings = LaunchedServer(launch=engine, arguments=("--last",))
    with_budget = command(installed, settings, Path("model"), values)
    without = command(installed, settings, Path("model"), replace(values, budget=False))
    assert set(with_budget) - set(without) == flags and with_budget[-1] == "--last"


def test_a_server_that_dies_at_the_start_is_reported_with_its_last_line(here, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN", "dies")
    assert distill(monkeypatch, "generate", recipe()) == 1
    error = capsys.readouterr().err
    assert "vllm ended with exit code 1 while it started (out of memory)" in error and "logs/server.log" in error
    monkeypatch.delenv("STAND_IN")
    assert distill(monkeypatch, "generate", recipe()) == 0 and none_is_left()


def test_a_command_that_cannot_be_run_is_reported(here, monkeypatch, capsys):
    (here / "bin/vllm").write_text("#!/nowhere/bin/python\n")
    assert distill(monkeypatch, "generate", recipe()) == 1
    error = capsys.readouterr().err
    assert "vllm ended with exit code 126 while it started (" in error and "bin/vllm: No such file" in error


def test_an_argument_that_the_server_does_not_know_is_reported(here, monkeypatch, capsys):
    assert distill(monkeypatch, "generate", recipe({"arguments": ["--nonsense"]})) == 1
    assert "exit code 2" in (error := capsys.readouterr().err) and "--nonsense" in error


def test_a_server_that_dies_in_the_middle_keeps_what_is_finished(here, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN", "quits:5")
    assert distill(monkeypatch, "generate", recipe()) == 1
    error = capsys.readouterr().err
    assert "vllm ended early with exit code 3 (CUDA error)" in error and none_is_left()
    before = stored()
    assert 2 <= before <= 4
    monkeypatch.delenv("STAND_IN")
    assert distill(monkeypatch, "generate", "launched.yaml") == 0
    assert stored() == 8 and none_is_left()


def test_a_budget_of_time_ends_while_the_server_starts(here, monkeypatch, capsys):
    """The clock jumps by two hours when the server's processes run."""
    monkeypatch.setenv("STAND_IN", "deaf")
    late = lambda: time.monotonic() + 7200 * bool(processes())  # noqa: E731
    clock = SimpleNamespace(monotonic=late, sleep=time.sleep, strftime=time.strftime)
    monkeypatch.setattr(launching, "time", clock)
    budgeted = {"sampling": {"max_new_tokens": 64}, "budget": {"hours": 1}}
    assert distill(monkeypatch, "generate", recipe(generate=budgeted)) == 1
    assert "the budget is used up" in capsys.readouterr().err and none_is_left()


def test_a_server_that_never_answers_is_ended(here, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN", "deaf")
    assert distill(monkeypatch, "generate", recipe({"start_timeout": 2})) == 1
    assert "did not answer within 2 seconds (server.start_timeout)" in capsys.readouterr().err and none_is_left()


def test_a_server_that_ignores_sigterm_is_killed(here, monkeypatch):
    monkeypatch.setattr(launching, "GRACE", 1.0)
    monkeypatch.setenv("STAND_IN", "stubborn")
    assert distill(monkeypatch, "generate", recipe()) == 0 and none_is_left()


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
@pytest.mark.parametrize("moment", [pytest.param("starting", marks=pytest.mark.slow), "answering"])
def test_no_process_is_left_whatever_ends_the_command(here, number, code, moment):
    faults = {"starting": {"STAND_IN": "deaf"}, "answering": {"STAND_IN_SECONDS": "60"}}[moment]
    command = [sys.executable, str(REPO / "cli.py"), "generate", recipe()]
    running = subprocess.Popen(command, env=os.environ | faults, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = Path("runs/launched/logs/server.log")
    deadline = time.monotonic() + 60
    while len(processes()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)  # in the middle of the wait, or of the first answers
    assert all(_runs(pid) for pid in processes()) and log.exists()
    running.send_signal(number)
    assert running.wait(60) == code
    assert none_is_left()


def test_settings_that_cannot_work_are_refused_before_anything_is_written(here, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    cases = {
        "pip install vllm": {},
        "server.executable: nowhere": {"executable": "nowhere"},
        "does not have vllm": {"executable": sys.executable},
        "server.url: unknown key": {"url": "http://localhost/v1"},
        "arguments: --port is set by distill; remove it": {"arguments": ["--port=1"]},
        "arguments: --tp is set by distill; use tensor_parallel_size": {"arguments": ["--tp", "2"]},
        "did you mean server.arguments?": {"argumens": []},
        "server.launch: should be 'vllm' or 'sglang'": {"launch": "other"},
    }
    for message, server in cases.items():
        assert distill(monkeypatch, "generate", recipe(server)) == 2, message
        assert message in capsys.readouterr().err
    assert not Path("runs/launched").exists() and not processes()


def test_a_mistake_in_an_address_is_reported_by_the_users_keys():
    base = {"name": "x", "teacher": "t", "student": "s", "prompts": [{"kind": "file", "path": "p"}]}
    for server, message in (({"model": "m"}, "server.url: is missing"), ({"url": "u", "model": 1}, "server.model: ")):
        with pytest.raises(UserError, match=message):
            parse(Recipe, base | {"eval": {"benchmarks": ["b"]}, "server": server}, "recipe.yaml")


@pytest.mark.parametrize(
    ("template", "thinking", "parser"),
    [
        (TEMPLATE, None, "deepseek_r1"),
        (TEMPLATE, False, None),
        ("{{ messages[0].content }}", None, None),
        ("{% if thinking %}<think>{% else %}</think>{% endif %}", True, "deepseek_v3"),
        ("{% if thinking %}<think>{% else %}</think>{% endif %}", None, "deepseek_v3"),
        ("{% if thinking %}<think>{% else %}</think>{% endif %}", False, None),
        ("{% if enable_thinking is defined %}<think></think>{% endif %}", None, "qwen3"),
        ("{% set thinking = 1 %}<think>", None, "deepseek_r1"),
    ],
)
def test_the_reasoning_parser_follows_from_the_template(template, thinking, parser):
    assert reasoning_parser(ENGINES["vllm"], template, thinking) == parser


def test_gpus_divide_the_attention_heads(tmp_path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 28}')
    assert [parallel_size(tmp_path, gpus) for gpus in (0, 1, 3, 4, 8)] == [1, 1, 2, 4, 7]


@pytest.mark.parametrize(
    ("listed", "visible", "count"),
    [(4, None, 4), (4, "1,3", 2), (4, "", 0), (4, "0,-1,2", 1), (1, "0,1", 1), (None, "0,1", 2), (None, None, 0)],
)
def test_gpus_are_counted_without_a_torch_that_sees_them(tmp_path, monkeypatch, listed, visible, count):
    if listed is not None:
        lines = "".join(f"GPU {number}: H200 (UUID: x)\\n  MIG 1g: y\\n" for number in range(listed))
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n[ $1 = -L ] && printf '{lines}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_count() == count


@pytest.mark.slow
def test_the_start_of_a_server_is_no_part_of_its_rate(here, monkeypatch):
    """A clock on which a start takes 1,000 seconds more."""
    late, start = [0.0], launching.LaunchedBackend._start
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0], sleep=time.sleep, strftime=time.strftime)

    def slowly(backend, give_up):
        late[0] += 1000
        return start(backend, give_up)

    monkeypatch.setattr(launching.LaunchedBackend, "_start", slowly)
    for module in (launching, generate):
        monkeypatch.setattr(module, "time", clock)
    assert distill(monkeypatch, "plan", recipe(), "--pilot", 2) == 0
    measured = Plan.read(Path("runs/launched/plan.json"), "").measured
    tokens = sum(trace.tokens for trace in TraceStore(Path("runs/launched/traces")))
    assert measured.rate > tokens / 500
    assert distill(monkeypatch, "generate", "launched.yaml") == 0 and late[0] == 2000
    summary = Run(Path("runs/launched"), catalog.load_recipe("launched.yaml")).stored_summary(
        "generate", GenerateSummary
    )
    assert summary.seconds > 1000 and summary.tokens_per_second > 0
