"""Probe: a second of matrix products, attention and copies, to tell what this machine reaches."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from kvtier.transfer.accelerator import engine_for
from kvtier.transfer.base import CopyEngine

_SECONDS = 0.25  # of each kind; the fastest of a few counts, because disturbances only make things slower
_ROWS = 512  # tokens of a piece of a prompt
_WIDTH = 1024
_HEADS, _HEAD_DIM, _ATTENDED = 8, 64, 1024
_COPIED_BYTES = 64 * 2**20  # more than a processor's caches, as K and V are
_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device reaches, measured.

    Attributes:
        matrix_operations_per_second: additions and multiplications of a matrix product.
        pair_operations_per_second: the same of attention.
        memory_bytes_per_second: of weights that are read.
        load_bytes_per_second: of K and V that are copied from RAM to where the device computes.
        disk_bytes_per_second: of files that are read; None if no folder can be written.
        disk_is_dropped: whether the system was told to drop the file first, so that the drive is measured.
    """

    matrix_operations_per_second: float
    pair_operations_per_second: float
    memory_bytes_per_second: float
    load_bytes_per_second: float
    disk_bytes_per_second: float | None
    disk_is_dropped: bool


def measured_rates(device: torch.device, dtype: torch.dtype, folder: Path) -> Rates:
    """Measure ``device`` for about a second.

    Args:
        device: where models compute.
        dtype: of weights, K and V.
        folder: an existing folder in which a file is written, read and deleted.
    """
    with closing(engine_for(device)) as engine, torch.inference_mode():
        disk, dropped = _disk_rate(folder)
        return Rates(
            _matrix_rate(engine, device, dtype),
            _attention_rate(engine, device, dtype),
            _read_rate(engine, device, dtype),
            _copy_rate(engine, device),
            disk,
            dropped,
        )


def _fastest(engine: CopyEngine, once: Callable[[], object]) -> float:
    """Return the seconds of the fastest call within the time of a probe, after one that does not count."""
    best, until = float("inf"), float("inf")
    while time.perf_counter() < until:
        started = time.perf_counter()
        once()
        engine.settle(engine.mark())
        if until == float("inf"):
            until = time.perf_counter() + _SECONDS
        else:
            best = min(best, time.perf_counter() - started)
        if time.perf_counter() >= until and best == float("inf"):
            return time.perf_counter() - started  # so slow that one call takes all the time
    return best


def _matrix_rate(engine: CopyEngine, device: torch.device, dtype: torch.dtype) -> float:
    tokens = torch.ones(_ROWS, _WIDTH, device=device, dtype=dtype)
    weights = torch.ones(_WIDTH, 4 * _WIDTH, device=device, dtype=dtype)
    return 2 * _ROWS * _WIDTH * 4 * _WIDTH / _fastest(engine, lambda: tokens @ weights)


def _attention_rate(engine: CopyEngine, device: torch.device, dtype: torch.dtype) -> float:
    q, k, v = (torch.ones(1, _HEADS, _ATTENDED, _HEAD_DIM, device=device, dtype=dtype) for _ in range(3))
    once = _fastest(engine, lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    return 4 * _HEADS * _HEAD_DIM * (_ATTENDED * (_ATTENDED + 1) / 2) / once


def _read_rate(engine: CopyEngine, device: torch.device, dtype: torch.dtype) -> float:
    """Return the bytes of weights a second that one token's matrix product reads."""
    # In all more than a processor's caches hold, as the weights of a model are.
    weights = [torch.ones(4 * _WIDTH, 2 * _WIDTH, device=device, dtype=dtype) for _ in range(8)]
    token = torch.ones(1, 2 * _WIDTH, device=device, dtype=dtype)
    once = _fastest(engine, lambda: [torch.nn.functional.linear(token, each) for each in weights])
    return sum(each.nbytes for each in weights) / once


def _copy_rate(engine: CopyEngine, device: torch.device) -> float:
    source = engine.host_empty(_COPIED_BYTES)
    source.zero_()
    target = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    return _COPIED_BYTES / _fastest(engine, lambda: engine.settle(engine.copy(target, source, after=[engine.mark()])))


def _disk_rate(folder: Path) -> tuple[float | None, bool]:
    """Return the bytes a second at which a new file is read, and whether the page cache was emptied of it first."""
    buffer = bytearray(_FILE_BYTES)
    dropped = False
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(2**20) * (_FILE_BYTES // 2**20))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                with contextlib.suppress(OSError):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    dropped = True
            started = time.perf_counter()
            file.seek(0)
            file.readinto(buffer)
            return _FILE_BYTES / (time.perf_counter() - started), dropped
    except OSError:
        return None, False
