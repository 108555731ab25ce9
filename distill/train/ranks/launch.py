"""The processes of one training: this one alone, processes started here, or those that torchrun has started.

Started here: one process per rank (`ranks.worker`), with torchrun's environment variables. Rejected: torchrun's own
agent, which waits thirty seconds between SIGTERM and SIGKILL, less than writing a 70B checkpoint takes.

Ctrl-C reaches this process, which forwards it once; the ranks finish their step together, save, and exit. If a rank
dies, the others are killed, because they would wait for it for ever; a rank whose parent died exits at the end of its
standard input.
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distill.artefacts import TrainSummary
from distill.children import Child, free_port
from distill.errors import UserError, WorkError
from distill.hardware import cores
from distill.recipe import Train
from distill.train.ranks import environment
from distill.train.ranks.worker import INTERRUPTED, Failure

POLL = 0.1  # seconds between two looks at the processes
DEVICES = Path("/dev")
GPUS = ("nvidia[0-9]*", "kfd", "dxg")  # among them: of NVIDIA, of AMD, in WSL


def processes(settings: Train) -> int:
    """Number of processes that train together: as torchrun started, as the recipe says, or one per GPU.

    Errors: UserError when torchrun's environment variables are incomplete.
    """
    if environment.is_distributed():
        return environment.size()
    if settings.num_processes:
        return settings.num_processes
    return max(1, gpus())


def gpus() -> int:
    """Number of GPUs that torch sees. Without a device of one, torch is not imported, which takes seconds."""
    if not any(True for pattern in GPUS for _ in DEVICES.glob(pattern)):
        return 0
    import torch

    return torch.cuda.device_count()


def refuse_too_many(settings: Train) -> None:
    """Errors: UserError where `num_processes` is more than the GPUs of this machine, if it has some."""
    if environment.is_distributed() or settings.num_processes is None:
        return
    if 0 < (count := gpus()) < settings.num_processes:
        raise UserError(
            f"train.num_processes is {settings.num_processes} and this machine has {count} "
            f"{'GPU' if count == 1 else 'GPUs'}; lower it, or remove it for one process per GPU"
        )


def start(directory: Path, count: int) -> TrainSummary:
    """Train the run in `directory` with `count` processes; returns the summary of the first rank.

    Errors: the error of the rank that failed first; KeyboardInterrupt when the ranks were interrupted and have saved.
    """
    with tempfile.TemporaryDirectory(prefix="distill-train-") as scratch, forwarded_signals() as signals:
        outcomes = [Path(scratch) / f"{rank}.json" for rank in range(count)]
        port = free_port()
        ranks = [_rank(directory, rank, count, port, outcomes[rank]) for rank in range(count)]
        try:
            _wait([rank.process for rank in ranks], signals)
        finally:
            codes = [rank.end() for rank in ranks]
        return _outcome(outcomes, codes, interrupted=bool(signals))


def _rank(directory: Path, rank: int, count: int, port: int, outcome: Path) -> Child:
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, cores() // count)),
    }
    return Child(
        "distill.train.ranks.worker",
        (str(directory), str(outcome)),
        {name: str(value) for name, value in variables.items()},
        detached=True,  # this process forwards Ctrl-C
        speaks=False,
    )


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], signals: list[int]) -> None:
    """Wait until all have exited or one has failed."""
    forwarded = 0
    while any(process.poll() is None for process in ranks):
        if any(process.returncode not in (None, 0, INTERRUPTED) for process in ranks):
            return
        for number in signals[forwarded:]:
            for process in ranks:
                if process.poll() is None:
                    process.send_signal(number)
        forwarded = len(signals)
        time.sleep(POLL)


def _outcome(outcomes: Sequence[Path], codes: Sequence[int], interrupted: bool) -> TrainSummary:
    for path, code in zip(outcomes, codes, strict=True):
        if code in (1, 2) and path.exists():
            raise (UserError if code == 2 else WorkError)(Failure.read(path, "rerun the same command").message)
    if INTERRUPTED in codes or (interrupted and any(codes)):
        raise KeyboardInterrupt
    for rank, code in enumerate(codes):
        if code:
            raise WorkError(
                f"training process {rank + 1} of {len(codes)} ended with exit code {code}: rerun the same command; it "
                f"resumes from the newest checkpoint"
            )
    return TrainSummary.read(outcomes[0], "rerun the same command")


@contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """A list that collects SIGINT and SIGTERM instead of interrupting this process."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
