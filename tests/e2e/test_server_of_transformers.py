"""A run whose teacher is behind a server that is not ours: `transformers serve`."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from eval_support import distill

from distill.artefacts import GenerateSummary, RunPaths
from distill.record import StageRecord
from distill.traces.store import TraceStore

TEACHER = Path(__file__).resolve().parents[2] / "teachers" / "tiny-r1"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory, port = tmp_path_factory.mktemp("server"), free_port()
    program = shutil.which("transformers", path=Path(sys.executable).parent.as_posix()) or shutil.which("transformers")
    assert program, "the development tools hold transformers' command line"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "hub"), "OMP_NUM_THREADS": "1"}
    with (directory / "log").open("w") as log:
        command = [program, "serve", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (directory / "log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_with_its_answers(address, stream, tmp_path, monkeypatch, capsys):
    """Its reasoning has no opening tag, which the prompt holds. It lists no models, and takes no request for a seed."""
    settings = {
        "server": f"{{url: {address}, model: {TEACHER}, concurrency: 2, stream: {str(stream).lower()}}}",
        "prompts.0.limit": 12,
        "filter.select.per_prompt": 1,
        "train.max_steps": 1,
        "eval.limit": 2,
        "eval.models": "[base, student]",
    }
    arguments = [f"--set={key}={value}" for key, value in settings.items()]
    assert distill(monkeypatch, "run", "tiny", "--run-dir", tmp_path / "run", *arguments) == 0, capsys.readouterr().err
    paths = RunPaths(tmp_path / "run")
    traces = list(TraceStore(paths.traces))
    assert len(traces) == 12 and all(trace.form == "end_think" and trace.reasoning for trace in traces)
    assert all(trace.text.startswith("<think>\n") and trace.prompt_tokens and trace.tokens for trace in traces)
    summary = GenerateSummary.model_validate_json(json.dumps(StageRecord.read(paths.record("generate"), "").summary))
    assert summary.forms == {"end_think": 12} and summary.numerics == {"kernels": "server"}
    assert "filter" in capsys.readouterr().out and (paths.student / "model.safetensors").is_file()
