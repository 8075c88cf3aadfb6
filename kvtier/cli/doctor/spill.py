"""Checks of the spill folder: write access, file system and speed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil

from kvtier.cli.doctor.findings import Finding, gigabytes

_FILE_BYTES = 256 * 2**20
_PIECE_BYTES = 16 * 2**20
_LONGEST_SECONDS = 4.0  # limit of writing: a slow disk shows in less data
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_TOO_LITTLE_BYTES = 2**30


class Partition(Protocol):
    """A mounted file system, as psutil reports it."""

    mountpoint: str
    fstype: str


def check_spill_folder(folder: Path) -> Iterator[Finding]:
    """Yield findings about ``folder`` and its disk. All files made here are deleted, even after an error."""
    try:
        with made_inside(folder) as scratch:
            yield _space(folder)
            yield _speed(scratch / "pages", folder)
    except OSError as error:
        text = f"cannot keep files in {folder}: {error}; name a folder you can write to (spill_dir, --spill-dir)"
        yield Finding("problem", "spill folder", text, {"folder": str(folder)})


@contextmanager
def made_inside(folder: Path) -> Iterator[Path]:
    """Yield a new folder in ``folder``, and delete it with its content afterwards.

    ``folder`` and its parents are made if they are missing, and then deleted afterwards if they are empty.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="kvtier-doctor-", dir=folder) as scratch:
            yield Path(scratch)
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # never made, or in use by another program
                path.rmdir()


def file_system(folder: Path, partitions: Sequence[Partition] | None = None) -> str:
    """Return the kind of file system of ``folder``, e.g. ``ext4``, or ``unknown``."""
    path = folder.resolve()
    mounted: Sequence[Any] = psutil.disk_partitions(all=True) if partitions is None else partitions
    above = [part for part in mounted if path.is_relative_to(part.mountpoint)]
    # Of several on one mount point, the last one mounted hides the others.
    deepest = max(enumerate(above), key=lambda it: (len(Path(it[1].mountpoint).parts), it[0]), default=None)
    return (deepest and deepest[1].fstype) or "unknown"


def _space(folder: Path) -> Finding:
    kind, usage = file_system(folder), shutil.disk_usage(folder)
    facts = {
        "folder": str(folder),
        "file_system": kind,
        "free_bytes": usage.free,
        "total_bytes": usage.total,
        "in_memory": kind in _MEMORY_FILE_SYSTEMS,
    }
    text = f"{folder} on {kind}, {gigabytes(usage.free)} of {gigabytes(usage.total)} free"
    if kind in _MEMORY_FILE_SYSTEMS:
        text += ". That is RAM: pages there save none. Name a folder on a disk"
        return Finding("note", "spill folder", text, facts)
    if usage.free < max(usage.total // 20, _TOO_LITTLE_BYTES):
        return Finding("note", "spill folder", f"{text}: nearly full. Make room, or name another folder", facts)
    return Finding("ok", "spill folder", text, facts)


def _speed(path: Path, folder: Path) -> Finding:
    """Write a file and read it from the page cache and, where the cache can be emptied, from the disk."""
    room = shutil.disk_usage(folder).free // 4
    if room < _PIECE_BYTES:
        text = f"{folder} has no room for the {gigabytes(4 * _PIECE_BYTES)} that measuring it takes"
        return Finding("problem", "disk", text)
    piece = os.urandom(_PIECE_BYTES)  # a file system that compresses gains nothing
    written, write_seconds = _write(path, piece, min(_FILE_BYTES, room))
    warm_seconds, same = _read(path, piece)
    facts: dict[str, Any] = {
        "file_bytes": written,
        "write_bytes_per_second": written / write_seconds,
        "cached_read_bytes_per_second": written / warm_seconds,
    }
    text = (
        f"writes {gigabytes(facts['write_bytes_per_second'])}/s to the disk, "
        f"reads {gigabytes(facts['cached_read_bytes_per_second'])}/s from the page cache"
    )
    if hasattr(os, "posix_fadvise") and file_system(folder) not in _MEMORY_FILE_SYSTEMS:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cold_seconds, still_same = _read(path, piece)
        same = same and still_same
        facts["dropped_read_bytes_per_second"] = written / cold_seconds
        text += f", {gigabytes(facts['dropped_read_bytes_per_second'])}/s after it was told to drop the file"
    if not same:
        return Finding("problem", "disk", f"{folder} gives back other bytes than were written: do not use it", facts)
    return Finding("ok", "disk", f"{text} ({gigabytes(written)} tried)", facts)


def _write(path: Path, piece: bytes, nbytes: int) -> tuple[int, float]:
    """Write about ``nbytes`` in whole pieces; return the bytes written and the seconds until they were on the disk."""
    written, started = 0, time.perf_counter()
    with path.open("wb", buffering=0) as file:
        while not written or (written + len(piece) <= nbytes and time.perf_counter() - started < _LONGEST_SECONDS):
            left = memoryview(piece)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
            written += len(piece)
    return written, time.perf_counter() - started


def _read(path: Path, piece: bytes) -> tuple[float, bool]:
    """Read the whole file; return the seconds of the reads, and whether it has the bytes that were written."""
    buffer = bytearray(len(piece))
    seconds, same = 0.0, True
    with path.open("rb", buffering=0) as file:
        while True:
            started = time.perf_counter()
            count = file.readinto(buffer)
            seconds += time.perf_counter() - started
            if not count:
                return seconds, same
            same = same and count == len(piece) and buffer == piece
