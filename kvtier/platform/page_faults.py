"""Page faults: memory that was never written, provided in one call instead of page by page."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14
_FEWEST_BYTES = 16 * mmap.PAGESIZE  # below, the call takes as long as the faults


def provide(address: int, nbytes: int) -> bool:
    """Let the system provide the pages that lie wholly in ``nbytes`` of memory from ``address`` on; contents stay.

    The caller is about to write all of it, so no more memory is taken than without. Otherwise each page is provided
    when it is first written, which takes an exception of the processor each. Other threads run meanwhile.

    Returns:
        Whether it was done. A system that cannot, or lacks memory now, does nothing: writing works as ever.
    """
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    advise = _madvise() if size >= _FEWEST_BYTES else None
    return advise is not None and advise(begin, size, _POPULATE_WRITE) == 0


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the system's ``madvise``; None where it does not know this advice."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        advise: Callable[[int, int, int], int] = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]  # type: ignore[attr-defined]
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        tried = ctypes.c_char.from_buffer(page)
        knows = advise(ctypes.addressof(tried), mmap.PAGESIZE, _POPULATE_WRITE) == 0
        del tried  # else the mapping could not be closed
    return advise if knows else None
