"""A `distill serve` of its own process, for tests that ask it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Serving:
    """url: with /v1. process: the server's."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.root = url.removesuffix("/v1")

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> tuple[int, str, str]:
        """End it. Returns exit code, stdout after the address, and stderr."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


@contextmanager
def serving(*arguments: object, **environment: str) -> Iterator[Serving]:
    """A server on a free port of the loopback interface; it is killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distill.command", "serve", *map(str, arguments), "--port", "0"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"http://\S+/v1", line):
                yield Serving(process, match[0])
                break
        else:
            assert process.stderr is not None
            raise AssertionError(process.stderr.read())
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
