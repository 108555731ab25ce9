"""Run this interpreter with arguments as a user without rights, from a root caller.

An interpreter below a directory that only root may enter is shown to that user in a mount namespace of the process.
"""

import os
import sys
import tempfile
from pathlib import Path

from distill.grading.sandbox import kernel

USER = 12345  # owns nothing


def closed_directory(path: Path) -> Path | None:
    """The highest directory above a path that others may not enter; None where they may enter all."""
    return next((above for above in reversed(path.parents) if not above.stat().st_mode & 1), None)


def show(path: Path, closed: Path) -> None:
    """Replace a closed directory by an open one with nothing but a path below it, for this process and its children."""
    kernel.unshare(kernel.NEWNS)
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    aside = tempfile.mkdtemp()
    kernel.mount(str(path), aside, None, kernel.MS_BIND | kernel.MS_REC)
    kernel.mount("tmpfs", str(closed), "tmpfs", 0, "mode=755")
    path.mkdir(parents=True)
    kernel.mount(aside, str(path), None, kernel.MS_BIND | kernel.MS_REC)


def main() -> None:
    """Become the user, in a home of its own, and execute the interpreter."""
    interpreter = Path(sys.base_prefix).resolve()
    if closed := closed_directory(interpreter):
        show(interpreter, closed)
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    home = tempfile.mkdtemp()
    os.environ.update(HOME=home, TMPDIR=home)
    os.execv(sys.executable, [sys.executable, "-B", *sys.argv[1:]])


if __name__ == "__main__":
    main()
