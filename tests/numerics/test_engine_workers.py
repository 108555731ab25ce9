"""Engines in processes of their own: the same text as one, and no death goes unnoticed, theirs or ours."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_checks import engine_options, some_tokens
from safetensors.torch import load_file, save_file

from distill.engine import (
    Completion,
    Engine,
    EngineDied,
    EngineOptions,
    Engines,
    NonFiniteLogits,
    Request,
    SamplingParams,
)
from distill.engine.device import devices_for, refuse_too_large

TINY_R1 = Path(__file__).resolve().parents[2] / "teachers" / "tiny-r1"


def requests(count: int, new: int = 8) -> Iterator[Request]:
    params = SamplingParams(temperature=0.8, top_p=0.9, max_new_tokens=new, stop_token_ids=(3,), logprobs=2)
    for i in range(count):
        yield Request(f"r{i}", tuple(some_tokens(5 + i, seed=i)), params, 1, i, (0, 1, 4))


def by_sample(completions: Iterator[Completion]) -> dict[tuple[str, int], Completion]:
    return {(done.request_id, done.sample): done for done in completions}


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    with Engines.load(TINY_R1, ["cpu", "cpu"], engine_options(max_batch=4, dtype=torch.bfloat16)) as engines:
        yield engines


def test_many_engines_say_what_one_says(engines: Engines) -> None:
    one = Engine.load(TINY_R1, engine_options(device="cpu", dtype=torch.bfloat16, max_batch=4))
    ours, theirs = by_sample(engines.generate(requests(12))), by_sample(one.generate(requests(12)))
    assert ours == theirs and len(ours) == 36
    assert (engines.numerics, engines.max_context) == (one.numerics, one.max_context)
    assert (engines.usage.completion_tokens, engines.usage.prompt_tokens) == (
        one.usage.completion_tokens,
        one.usage.prompt_tokens,
    )
    assert engines.usage.drafts_proposed == 0
    counts = [worker.usage.completion_tokens for worker in engines._workers]
    assert len(counts) == 2 and min(counts) > 0, f"the work was not shared: {counts}"


def test_requests_are_pulled_as_they_can_be_started(engines: Engines) -> None:
    pulled = 0

    def endless() -> Iterator[Request]:
        nonlocal pulled
        for pulled, request in enumerate(requests(10**6), start=1):  # noqa: B007
            yield request

    stream = engines.generate(endless())
    first = [next(stream) for _ in range(10)]
    assert len(first) == 10 and pulled < 20
    stream.close()
    assert len(by_sample(engines.generate(requests(3)))) == 9  # what was given up is forgotten
    assert all(worker.outstanding == 0 for worker in engines._workers)


def test_requests_are_given_up_at_the_deadline(engines: Engines) -> None:
    assert list(engines.generate(requests(3), time.monotonic())) == []
    by_sample(engines.generate(requests(10**6), time.monotonic() + 0.2))  # ends at all
    assert len(by_sample(engines.generate(requests(3)))) == 9
    assert all(worker.outstanding == 0 for worker in engines._workers)


@pytest.mark.slow
def test_what_an_engine_refuses_is_refused_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((TINY_R1 / "config.json").read_text())
    with pytest.raises(ValueError, match="download the weights"):
        Engines.load(tmp_path, ["cpu", "cpu"], engine_options())


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_named_across_processes(tmp_path: Path) -> None:
    path = Path(shutil.copytree(TINY_R1, tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"].fill_(1e38)
    save_file(tensors, path / "model.safetensors")
    refused = pytest.raises(NonFiniteLogits, match="the logits of the token at position 5 are not finite")
    with Engines.load(path, ["cpu", "cpu"], EngineOptions(max_batch=4)) as engines, refused:
        list(engines.generate(requests(1)))


def test_a_killed_engine_is_named() -> None:
    with Engines.load(TINY_R1, ["cpu", "cpu"], engine_options(max_batch=4)) as engines:
        stream = engines.generate(requests(50, new=64))
        next(stream)
        engines._workers[1].process.send_signal(signal.SIGKILL)
        with pytest.raises(EngineDied, match=r"the engine on cpu died \(exit code -9\)"):
            list(stream)


def test_engines_end_with_their_parent() -> None:
    script = (
        "import sys, time\nfrom distill.engine import EngineOptions, Engines\n"
        "engines = Engines.load(sys.argv[1], ['cpu', 'cpu'], EngineOptions())\n"
        "print(*(worker.process.pid for worker in engines._workers), flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(TINY_R1)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        parent.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "an engine outlived its parent"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_devices() -> None:
    assert devices_for("cpu", None) == ["cpu"]
    assert devices_for("cpu", 3) == ["cpu"] * 3
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU can be used here"):
            devices_for("cuda", None)


def test_a_model_past_one_gpu_is_sent_to_a_server() -> None:
    experts = [
        (f"model.layers.{layer}.mlp.experts.{i}.up_proj.weight", 11 << 30) for layer in range(9) for i in range(7)
    ]
    rest = [("lm_head.weight", 3 << 30), ("model.layers.0.self_attn.o_proj.weight", 5 << 30)]
    refuse_too_large("r1", experts + rest, (2 * 77 + 8) << 30)  # two layers' experts, and what is not experts
    with pytest.raises(ValueError, match=r"vllm serve r1 --tensor-parallel-size 8.*--model-path r1 --tp 8"):
        refuse_too_large("r1", experts + rest, (2 * 77 + 8 << 30) - 1)
    with pytest.raises(ValueError, match=r"140 GiB .* 72 GiB .* --tp 4"):
        refuse_too_large("llama", [("lm_head.weight", 140 << 30)], 72 << 30)
