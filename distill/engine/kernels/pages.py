"""Memory in pages of the system: taken only where it is written to, and given back although it stays allocated."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import cache

import torch
from torch import Tensor


def zeros(size: int) -> Tensor:
    """`size` bytes of zeros, uint8, that take memory only where they are written to.

    The C library's zeros do not: where it has kept freed memory, it fills that with zeros.
    """
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def discard(address: int, size: int) -> None:
    """Give the whole pages of a range of this process's memory back. For memory whose next use is to be filled.

    What they hold is lost: they read as zeros, or as the file where one is mapped, and take memory again when they are
    written to. Nothing happens outside of Linux, where `madvise` promises less.
    """
    if sys.platform != "linux":
        return
    page = os.sysconf("SC_PAGE_SIZE")
    begin, end = -(-address // page) * page, (address + size) // page * page
    if begin < end:
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
