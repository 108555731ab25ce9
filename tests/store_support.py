"""What the ledger's and the store's tests share: traces to store, a disk that fills, and writers that get killed.

Run as a script this file is a nursery: it imports once and forks a writer for every line it reads, so that killing
twenty writers costs seconds and not half a minute of imports.
"""

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL
from typing import Any

from distill.prompts.prompt import Prompt
from distill.traces import parts as parts_module
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore, write_traces
from distill.traces.trace import Trace


def trace(sample: int, size: int = 10) -> Trace:
    """A trace whose whole content follows from its sample number."""
    text = f"<think>\n{sample}\n</think>\n{sample}" + random.Random(sample).randbytes(size // 2).hex()
    tokens = tuple(range(sample, sample + 5))
    logprobs = tuple(-float(n) for n in range(5))
    prompt = Prompt.from_question(f"question {sample // 4}", "4", "math", "test")
    return Trace(prompt, sample, 0, text, str(sample), text[-4:], "stop", "ab", (1, 2), tokens, logprobs)


def row(number: int) -> dict[str, Any]:
    """A ledger row that takes long enough to write to be cut off."""
    return {"number": number, "text": f"{number} " * 300_000}


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow past `size` bytes: writes end part-way and then raise OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def killed_writers(kind: str, path: Path, times: int, longest: float) -> Iterator[set[int]]:
    """Start a writer on `path`, kill it within `longest` seconds of its first success, and again, `times` in all.

    Yields after every kill the numbers that were acknowledged so far; none of them may come twice.
    """
    rng, log = random.Random(0), path.with_name("acknowledged")
    log.touch()
    command = [sys.executable, __file__, kind, str(path), str(log)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
    ) as nursery:
        assert nursery.stdin and nursery.stdout
        for _ in range(times):
            length = log.stat().st_size
            nursery.stdin.write("\n")
            writer = int(nursery.stdout.readline())
            while log.stat().st_size == length:
                os.kill(writer, 0)  # raises when it died by itself
                time.sleep(0.001)
            time.sleep(rng.uniform(0, longest))
            os.kill(writer, SIGKILL)
            assert nursery.stdout.readline() == "dead\n"
            numbers = [int(line) for line in log.read_text().splitlines()]
            assert len(set(numbers)) == len(numbers), "a finished row was made again"
            yield set(numbers)
        nursery.stdin.close()


def _write_ledger(path: Path, acknowledge: Callable[[list[int]], None]) -> None:
    with Ledger(path) as ledger:
        number = sum(1 for _ in ledger.rows())
        while True:
            batch = [number, number + 1]
            ledger.append(row(n) for n in batch)
            acknowledge(batch)
            number += 2


def _write_store(path: Path, acknowledge: Callable[[list[int]], None]) -> None:
    parts_module.SHARD_ROWS, parts_module.GROUP_ROWS = 4, 2
    store = TraceStore(path)
    while True:
        with store:
            sample = len(store)
            for batch in ([sample], [sample + 1, sample + 2], [sample + 3], [sample + 4]):
                store.append(trace(n, size=150_000) for n in batch)
                acknowledge(batch)
        store.compact()


def _nursery(write: Callable[[Path, Callable[[list[int]], None]], None], path: Path, log: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # the first Parquet file of a process takes long: do that before
        write_traces(Path(name) / "warm", [trace(0)])
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for _ in sys.stdin:
        writer = os.fork()
        if writer == 0:
            write(path, lambda batch: os.write(descriptor, "".join(f"{n}\n" for n in batch).encode()) and None)
        print(writer, flush=True)
        os.waitpid(writer, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    _nursery({"ledger": _write_ledger, "store": _write_store}[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]))
