"""Memory that is given back to the system although it stays allocated: pointers to it stay valid."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys


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
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
