"""The system's page cache: take files out of it, and see what is left of them there."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def can_drop() -> bool:
    """Whether this system lets a process drop files from the page cache."""
    return hasattr(os, "posix_fadvise")


def drop(files: Iterable[Path]) -> None:
    """Drop ``files`` from the page cache: written out first, because pages that are not on disk yet stay."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def resident_share(files: Iterable[Path]) -> float:
    """Return the share of the pages of ``files`` that are in the page cache, without reading any of them."""
    libc = ctypes.CDLL(None, use_errno=True)
    resident = pages = 0
    for path in files:
        size = path.stat().st_size
        if size == 0:
            continue
        count = -(-size // mmap.PAGESIZE)
        answer = (ctypes.c_ubyte * count)()
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            anchor = ctypes.c_char.from_buffer(mapped)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), answer)
            del anchor  # a mapping that is still referred to cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}", str(path))
        resident += sum(byte & 1 for byte in answer)
        pages += count
    return resident / pages if pages else 0.0
