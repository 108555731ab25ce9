"""The processes of one training: this one alone, some that are started here, or those that torchrun has started.

Started here: one process a rank (`distill.train.worker`), with torchrun's variables. torchrun's own agent was left: it
gives its processes thirty seconds between asking and killing, less than a 70B checkpoint takes to write.

Ctrl-C reaches this process, which passes it on once; the ranks finish their step together, save, and leave. A rank that
dies ends the others, which would wait for it for ever; a rank whose parent died ends at the end of its input.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distill.artefacts import TrainSummary
from distill.errors import UserError, WorkError
from distill.hardware import cores
from distill.recipe import Train

POLL = 0.1  # seconds between looks at the processes
INTERRUPTED = 130


def processes(settings: Train) -> int:
    """How many train together: as many as torchrun started, or as the recipe says, or one on each GPU."""
    if started := int(os.environ.get("WORLD_SIZE", "0")):
        return started
    if settings.num_processes:
        return settings.num_processes
    if not Path("/dev/nvidia1").exists():  # no second GPU: torch need not be asked, which takes seconds
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def start(directory: Path, count: int) -> TrainSummary:
    """Train the run in `directory` with `count` processes; gives the first one's summary.

    Raises what the process that failed first raised, KeyboardInterrupt when they were interrupted and have saved.
    """
    with tempfile.TemporaryDirectory(prefix="distill-train-") as place, passing_on() as asked:
        outcomes = [Path(place) / f"{rank}.json" for rank in range(count)]
        port = free_port()
        ranks = [_rank(directory, rank, count, port, outcomes[rank]) for rank in range(count)]
        try:
            _wait(ranks, asked)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return _outcome(outcomes, [process.returncode for process in ranks])


def _rank(directory: Path, rank: int, count: int, port: int, outcome: Path) -> "subprocess.Popen[bytes]":
    package_parent = str(Path(__file__).resolve().parents[2])
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, cores() // count)),
        "PYTHONPATH": os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH")))),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "distill.train.worker", str(directory), str(outcome)],
        stdin=subprocess.PIPE,
        env=os.environ | {name: str(value) for name, value in variables.items()},
        start_new_session=True,  # Ctrl-C is the parent's to pass on
    )


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], asked: list[int]) -> None:
    """Until all have ended, or one has failed."""
    passed_on = 0
    while any(process.poll() is None for process in ranks):
        if any(process.returncode not in (None, 0, INTERRUPTED) for process in ranks):
            return
        for number in asked[passed_on:]:
            for process in ranks:
                if process.poll() is None:
                    process.send_signal(number)
        passed_on = len(asked)
        time.sleep(POLL)


def _outcome(outcomes: Sequence[Path], codes: Sequence[int]) -> TrainSummary:
    told = [json.loads(path.read_text()) if path.exists() else {} for path in outcomes]
    for answer in told:
        if "message" in answer:
            raise (UserError if answer["code"] == 2 else WorkError)(answer["message"])
    for rank, code in enumerate(codes):
        if code not in (0, INTERRUPTED):
            raise WorkError(
                f"training process {rank + 1} of {len(codes)} ended with exit code {code}: rerun the same command; it "
                f"resumes from the newest checkpoint"
            )
    if INTERRUPTED in codes:
        raise KeyboardInterrupt
    return TrainSummary.model_validate_json(json.dumps(told[0]["summary"]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def passing_on() -> Iterator[list[int]]:
    """The list of interrupts that came, for somebody else to honour."""
    asked: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
