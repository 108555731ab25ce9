"""torchrun's environment variables: whether this process is one of several, and which.

A `WORLD_SIZE` that a scheduler or an earlier command left behind, without the variables that belong to it, would make
torch wait for processes that nobody starts; that is refused with one line. Standard library only: every command asks.
"""

import os

from distill.errors import UserError

REQUIRED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_distributed() -> bool:
    """Whether torchrun has started this process. Errors: UserError when its variables are incomplete or no numbers."""
    if "WORLD_SIZE" not in os.environ:
        return False
    size = _number("WORLD_SIZE")
    missing = [name for name in REQUIRED if name not in os.environ]
    if missing and size > 1:
        raise UserError(
            f"the environment has WORLD_SIZE={size} but not {', '.join(missing)}: start the ranks with torchrun, or "
            f"unset WORLD_SIZE"
        )
    if not 0 <= rank() < max(size, 1):
        raise UserError(f"the environment has RANK={rank()} and WORLD_SIZE={size}: unset both, or use torchrun")
    return not missing


def rank() -> int:
    """The rank of this process; 0 for a single one."""
    return _number("RANK") if "WORLD_SIZE" in os.environ and "RANK" in os.environ else 0


def size() -> int:
    """The number of ranks."""
    return _number("WORLD_SIZE") if is_distributed() else 1


def several() -> bool:
    """Whether torchrun has started this process as one of several."""
    return size() > 1


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise UserError(f"the environment has {name}={text!r}, which is no number: unset it, or use torchrun")
    return int(text)
