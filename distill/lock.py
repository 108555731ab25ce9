"""A directory for one process at a time.

flock and not a file with a process id, because the kernel drops it when the process dies, however it dies; and not
fcntl's record locks, which any close of the file in the process drops.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill import interrupts
from distill.errors import UserError

NAME = ".lock"
_held: set[int] = set()  # descriptors of the locks that this process holds


def _forget_locks() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


# A forked worker shares the lock's open file and would hold the lock after its parent was killed.
os.register_at_fork(after_in_child=_forget_locks)


def take(directory: Path, option: str) -> int:
    """Lock a directory; the descriptor holds the lock until `release`. The file names this process.

    option: the command line's option for another directory. Errors: UserError when another process holds the lock.
    """
    path = directory / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            by = f"process {holder}" if holder.isdigit() else "another process"
            raise UserError(f"{directory}: in use by {by}; wait for it, stop it, or choose another {option}") from error
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            break
        os.close(descriptor)  # its last holder removed the file between our open and our lock
    _held.add(descriptor)
    interrupts.hold()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def release(descriptor: int) -> None:
    """Give up a lock that `take` gave."""
    _held.discard(descriptor)
    os.close(descriptor)
    interrupts.release()


@contextmanager
def locked(directory: Path, option: str = "--out") -> Iterator[None]:
    """A directory that is not a run, created if necessary, for this process alone while the context lasts.

    The lock's file is removed at the end. Errors: UserError when another process works there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = take(directory, option)
    try:
        yield
    finally:
        (directory / NAME).unlink(missing_ok=True)
        release(descriptor)


def is_held(directory: Path) -> bool:
    """Whether another process works in a directory. Takes nothing: the answer may be old when it is read."""
    try:
        descriptor = os.open(directory / NAME, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
