"""Peak memory of a command: the proportional set size of its process and all descendants, sampled five times a second.

`Pss` in `/proc/PID/smaps_rollup`: a page that several processes share counts once. Rejected: `VmHWM`, which is of one
process, where we work in several.
"""

import subprocess
import time
from pathlib import Path

INTERVAL = 0.2  # seconds between two samples


def descendants(pid: int) -> list[int]:
    """A process and all that it started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    tree = [pid]
    for member in tree:
        tree += children.get(member, [])
    return tree


def proportional(pid: int) -> float:
    """The proportional set size of a process and its descendants, in MB."""
    total = 0
    for member in descendants(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def watch(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Wait for the end of a process: its peak memory in MB, and the second at which it was reached."""
    begun = time.perf_counter()
    peak, when = 0.0, 0.0
    while process.poll() is None:
        now = proportional(process.pid)
        if now > peak:
            peak, when = now, time.perf_counter() - begun
        time.sleep(INTERVAL)
    return peak, when
