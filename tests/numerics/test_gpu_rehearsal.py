"""`perf/gpu.py`, which is written for a GPU, runs from end to end without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # a minute, in Triton's interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: run perf/gpu.py itself")
def test_perf_gpu_runs_without_one(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    figures = tmp_path / "gpu.json"
    command = [sys.executable, ROOT / "perf" / "gpu.py", "--json", figures, "--work", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    results = json.loads(figures.read_text())
    assert {row["kernel"] for row in results["checks"]} == {row["kernel"] for row in results["kernels"]}
    assert len(results["checks"]) >= 18 and all(row["error"] < row["allowed"] for row in results["checks"])
    assert [row["what"] for row in results["engine"]] == ["decode × 1", "decode × 3", "prompts of 16"]
    assert results["engine"][0]["× transformers"] > 0
    assert "WRONG" not in done.stdout and "µs" not in done.stdout  # times of a rehearsal mean nothing
