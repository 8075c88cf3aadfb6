"""Verification: reads every file, compares every row, and counts every byte again."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvtier.errors import BlockError, StoreVersionError, UnavailableError
from kvtier.store.manage.chats import read_chat
from kvtier.store.tiers.disk.audit import Audit, Discrepancy
from kvtier.store.tiers.disk.recovery import OpenedFolder

_log = logging.getLogger("kvtier.store.disk")
_READERS = 2
Progress = Callable[[int, int], None]
"""``(bytes done, bytes in all)``, called now and then."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a store.

    Attributes:
        kind: ``damaged`` (a block's bytes), ``unreadable`` (they cannot be read now, and stay), ``missing`` (a row
            without its file), ``orphan`` (a file without its row), ``accounting``, ``leftover`` (of a dead writer),
            ``name`` (its file is damaged), ``chat`` (the same of a saved chat), ``permissions`` (others can read),
            ``catalog`` (SQLite finds it damaged; with ``repair`` it is rebuilt at the next open).
        subject: the affected file, or another subject.
        text: description of the problem.
        repaired: whether it was repaired.
    """

    kind: str
    subject: str
    text: str
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Result of ``PrefixStore.verify``.

    Attributes:
        blocks: block files that were read.
        nbytes: their bytes.
        seconds: how long it took.
        problems: all problems, repaired ones included.
    """

    blocks: int
    nbytes: int
    seconds: float
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether no unrepaired problem is left."""
        return all(problem.repaired for problem in self.problems)


def verify(opened: OpenedFolder, *, repair: bool, progress: Progress | None) -> VerifyReport:
    """Check everything in a folder; with ``repair`` fix problems where possible.

    Blocks that other processes evict meanwhile are no problem.
    """
    folder, audit, started = opened.folder, opened.audit, time.perf_counter()
    problems: list[Problem] = []

    def note(found: Iterable[Discrepancy]) -> None:
        for each in found:
            repaired = repair and _mended(each)
            problems.append(Problem(each.kind, each.subject, each.text, repaired))

    problems += [Problem("catalog", str(folder.catalog), text) for text in opened.database.problems()]
    if problems and repair:
        folder.damage_mark.touch(0o600)
    note(audit.unfinished())
    note(audit.leftovers())
    note(audit.files())
    note(audit.names())
    note(_damaged_chats(opened))
    blocks, nbytes = 0, 0
    for path, size, error in _read_all(opened, progress):
        if error is None:
            blocks, nbytes = blocks + 1, nbytes + size
        elif opened.catalog.entry(path.stem) is None:
            pass  # it was evicted, or is being written
        elif isinstance(error, UnavailableError):
            note([Discrepancy("unreadable", str(path), str(error), partial(audit.look_at, path, whole=True))])
        else:
            note([Discrepancy("damaged", str(path), str(error), partial(audit.drop, path.stem))])
    note(audit.total())
    note(audit.permissions())
    return VerifyReport(blocks, nbytes, time.perf_counter() - started, tuple(problems))


def _damaged_chats(opened: OpenedFolder) -> Iterator[Discrepancy]:
    folder = opened.folder
    for path in folder.chats():
        try:
            if folder.chat(read_chat(path).name) != path:
                raise ValueError("it is the file of another name")
        except (FileNotFoundError, StoreVersionError):
            continue  # removed meanwhile; or whole, for a newer kvtier
        except (OSError, ValueError, RecursionError) as error:
            text = f"cannot be read: {error}"
            yield Discrepancy("chat", str(path), text, partial(folder.filesystem.delete, path))


def _mended(discrepancy: Discrepancy) -> bool:
    try:
        discrepancy.mend()
    except (UnavailableError, OSError, sqlite3.Error) as error:
        _log.warning("%s cannot be put right: %s", discrepancy.subject, error)
        return False
    except BlockError:
        return True  # it was no block at all, and is deleted
    return True


def _read_all(opened: OpenedFolder, progress: Progress | None) -> Iterator[tuple[Path, int, BlockError | None]]:
    """Read every block file; yield its path, its size, and its error if it has one."""
    files = [(path, _size(path)) for path in opened.folder.block_files()]
    total, done = sum(size for _, size in files), 0
    with ThreadPoolExecutor(_READERS, thread_name_prefix="kvtier-verify") as pool:
        try:
            errors = pool.map(partial(_damage, opened.audit), [path for path, _ in files])
            for (path, size), error in zip(files, errors, strict=True):
                done += size
                if progress is not None:
                    progress(done, total)
                yield path, size, error
        finally:
            pool.shutdown(cancel_futures=True)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _damage(audit: Audit, path: Path) -> BlockError | None:
    """Read a block file whole; return its error, if it has one."""
    try:
        audit.look_at(path, whole=True)
    except BlockError as error:
        return error
    return None
