"""Sums of blocks of 2 KiB in main memory, computed on all cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WORD_BYTES = 8
BLOCK_WORDS = 256
BLOCK_BYTES = BLOCK_WORDS * WORD_BYTES
Sums = npt.NDArray[np.int64]
"""One weighted sum per block, modulo 2**64: ``[blocks]``."""
Bytes = npt.NDArray[np.uint8]

FACTORS = (np.arange(1, 2 * BLOCK_WORDS, 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
# One thread reads a third or half of what memory delivers: more than a few threads only wait for it.
_MOST_THREADS = 4
_PIECE_BYTES = 4 * 1024 * 1024
# Starting a thread takes about as long as reading this much.
_BYTES_PER_THREAD = 16 * 1024 * 1024


def block_sums(data: Bytes) -> Sums:
    """Return the sum of each block of aligned bytes, its words multiplied by one odd number each, modulo 2**64.

    Exact in any order, so equal on every device. PyTorch would wake its threads for each tensor.
    """
    sums: Sums = np.einsum("bw,w->b", data.view(np.int64).reshape(-1, BLOCK_WORDS), FACTORS)  # twice as fast as @
    return sums


def all_block_sums(several: Sequence[Bytes]) -> list[Sums]:
    """Return the sums of each of ``several`` pieces of memory, whole blocks of aligned bytes each.

    Several threads read; they have ended when this returns, however it does. If none can be started, the caller reads
    alone.
    """
    found = [np.empty(data.nbytes // BLOCK_BYTES, dtype=np.int64) for data in several]
    pieces = [
        (data[begin : begin + _PIECE_BYTES], sums[begin // BLOCK_BYTES :])
        for data, sums in zip(several, found, strict=True)
        for begin in range(0, data.nbytes, _PIECE_BYTES)
    ]
    pieces.sort(key=lambda piece: piece[0].nbytes)  # the largest are taken first: threads end at about the same time
    failed: list[BaseException] = []

    def read() -> None:
        try:
            while True:
                try:
                    data, sums = pieces.pop()
                except IndexError:
                    return
                read_sums = block_sums(data)
                sums[: len(read_sums)] = read_sums
        except BaseException as error:
            failed.append(error)

    total = sum(data.nbytes for data in several)
    threads = [threading.Thread(target=read, name="kvtier-digest", daemon=True) for _ in range(_helpers(total))]
    started = []
    try:
        for thread in threads:
            try:
                thread.start()
            except RuntimeError:  # no thread can be started
                break
            started.append(thread)
        read()
    finally:
        pieces.clear()  # after an interrupt, the others end too
        for thread in started:
            thread.join()
    if failed:
        raise failed[0]
    return found


def _helpers(total_bytes: int) -> int:
    """Return how many threads help the caller to read so many bytes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(cores, _MOST_THREADS, total_bytes // _BYTES_PER_THREAD) - 1)
