"""Peak memory of a command: the proportional set size of its process and all descendants.

`Pss` in `/proc/PID/smaps_rollup`: a page that several processes share counts once. Rejected: `VmHWM`, which is of one
process, where we work in several.

Reading it walks the pages of the process, which waits meanwhile: five times a second it took a fifth of the rate of a
small training. So it is read only when the resident set, which costs nothing, is larger than at the last reading, and
every few seconds, because a page that is no longer shared counts more.
"""

import subprocess
import time
from pathlib import Path

INTERVAL = 0.2  # seconds between two looks at the resident set
SELDOM = 5.0  # seconds between two readings of a resident set that does not grow
GROWN = 1.002  # the resident set, to be read again


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


def resident(pid: int) -> int:
    """The resident sets of a process and its descendants, in pages."""
    total = 0
    for member in descendants(pid):
        try:
            total += int(Path(f"/proc/{member}/statm").read_text().split()[1])
        except OSError:  # it has ended
            continue
    return total


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
    pages, read = 0.0, begun
    while process.poll() is None:
        size = resident(process.pid)
        if size > GROWN * pages or time.perf_counter() - read > SELDOM:
            pages, read = max(pages, size), time.perf_counter()
            now = proportional(process.pid)
            if now > peak:
                peak, when = now, read - begun
        time.sleep(INTERVAL)
    return peak, when
