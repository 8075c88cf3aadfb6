"""The file tier: one safetensors file a block, under a byte budget, found through the catalog."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kvtier.errors import BlockError, StoreError, StoreVersionError
from kvtier.store.base import Block
from kvtier.store.catalog import Catalog, NoRoom
from kvtier.store.chain import BlockId
from kvtier.store.format import FORMAT_VERSION, BlockFile, encode_block

_log = logging.getLogger("kvtier.store.disk")
T = TypeVar("T")
_TEMPORARY = re.compile(r"\.(?P<name>.+)-(?P<pid>\d{1,9})-[0-9a-f]{32}\.tmp")
# Files that this process is writing. A restarted container often has the process id of the one that died: what bears
# our own id and is not in here is a dead writer's.
_in_flight: set[str] = set()


class DiskTier:
    """Blocks as files below ``folder``. Only the user can read them (0700, 0600).

    A write is: reserve in the catalog → temporary file → fsync → rename → ready in the catalog. Whatever fails on the
    way is warned about once, undone, and the block stays out; nothing is raised to whoever was generating.

    Raises:
        StoreError: the folder cannot be used.
        StoreVersionError: a newer kvtier wrote it.
    """

    def __init__(self, folder: Path, budget_bytes: int, codec: str) -> None:
        self.folder = folder
        self.budget_bytes = budget_bytes
        self.codec = codec
        self._warned: set[str] = set()
        self._lost: set[str] = set()  # blocks that a failing catalog could not forget
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not folder.is_dir():
                raise NotADirectoryError(f"{folder} is not a folder")
            self._check_version()
            for name in ("blocks", "roots"):
                (folder / name).mkdir(mode=0o700, exist_ok=True)
            probe = folder / f".probe-{uuid.uuid4().hex}"
            probe.touch(mode=0o600)
            probe.unlink()
        except OSError as error:
            raise StoreError(f"cannot keep a store in {folder}: {error}; pass a folder you can write to") from error
        self._catalog = self._open_catalog()

    def _check_version(self) -> None:
        marker = self.folder / "kvtier.json"
        try:
            version = json.loads(marker.read_text())["format_version"]
            if type(version) is not int:
                raise ValueError(f"format_version {version!r}")
        except FileNotFoundError:
            with _claimed(marker):
                self._write(marker, [memoryview(json.dumps({"format_version": FORMAT_VERSION}).encode())])
            return
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{marker} is not the marker of a store ({error}); pass an empty folder") from error
        if version > FORMAT_VERSION:
            raise StoreVersionError(
                f"{self.folder} was written by a newer kvtier (format {version}, this one reads {FORMAT_VERSION}); "
                "update kvtier or pass another folder"
            )

    def _open_catalog(self) -> Catalog:
        path = self.folder / "catalog.sqlite"
        try:
            catalog = self._connect(path)
        except sqlite3.OperationalError as error:
            words = ("locked", "unable to open", "disk I/O", "full")
            if os.access(path, os.W_OK) and not any(word in str(error) for word in words):  # its header says so
                return self._made_anew(path, error)
            raise StoreError(f"cannot open {path}: {error}") from error
        except sqlite3.DatabaseError as error:
            return self._made_anew(path, error)
        return catalog

    def _made_anew(self, path: Path, error: sqlite3.Error) -> Catalog:
        self._warn("catalog", f"{path} is damaged ({error}); it is made anew from the block files")
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        return self._connect(path)

    def _connect(self, path: Path) -> Catalog:
        with contextlib.suppress(FileExistsError):
            # It holds token ids; SQLite would let others read. Only if it is new: to close a file ends all locks that
            # this process has on it, those of another store too.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        catalog = Catalog(path)
        try:
            catalog.rebuild_once(self._usable_files)
            self._sweep(catalog)
        except BaseException:
            catalog.close()
            raise
        return catalog

    def _block_files(self) -> list[Path]:
        return sorted((self.folder / "blocks").glob("*/*/*.safetensors"))

    def _usable_files(self) -> Iterator[tuple[BlockId, int]]:
        """Yield the identity and size of every block file; remove those that cannot be used."""
        for path in self._block_files():
            try:
                file = BlockFile(str(path))
                file.close()
                if path != self._path(file.id.root, file.id.key):
                    raise BlockError(f"{path} holds another block than its name says")
            except BlockError as error:
                self._warn(str(path), f"{error}; removed")
                path.unlink(missing_ok=True)
            else:
                yield file.id, file.nbytes

    def _sweep(self, catalog: Catalog) -> None:
        """Drop what processes that died while writing or evicting have left."""
        for key, root, writer in catalog.writers():
            if self._dead(writer, self._path(root, key)):
                catalog.remove(key)
        files = self._block_files()
        known = catalog.keys()  # asked after the files: whoever writes one has reserved it before
        for path in files:
            if path.stem not in known:
                path.unlink(missing_ok=True)
        for pattern in (".*.tmp", "roots/.*.tmp", "blocks/*/*/.*.tmp"):
            for path in self.folder.glob(pattern):
                name = _TEMPORARY.fullmatch(path.name)
                if name and self._dead(int(name["pid"]), path.with_name(name["name"])):
                    path.unlink(missing_ok=True)

    @staticmethod
    def _dead(writer: int, path: Path) -> bool:
        """Whether the process that was writing ``path`` is gone."""
        return os.path.realpath(path) not in _in_flight if writer == os.getpid() else not _alive(writer)

    def _warn(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            _log.warning("%s", message)

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        """Answer from the catalog; when it fails, warn once and answer ``otherwise``."""
        try:
            return question()
        except sqlite3.Error as error:
            self._warn("catalog", f"the catalog of {self.folder} fails ({error}); its blocks are recomputed")
            return otherwise

    def _path(self, root: str, key: str) -> Path:
        return self.folder / "blocks" / root / key[:2] / f"{key}.safetensors"

    def _write(self, path: Path, pieces: Sequence[memoryview]) -> None:
        """Put ``pieces`` at ``path``: whole, or not at all."""
        for folder in reversed([parent for parent in path.parents if parent.is_relative_to(self.folder)]):
            folder.mkdir(mode=0o700, exist_ok=True)  # not parents=True: that makes those with the default mode
        temporary = path.parent / f".{path.name}-{os.getpid()}-{uuid.uuid4().hex}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "wb", buffering=0) as file:
                for piece in pieces:
                    while piece.nbytes:
                        piece = piece[file.write(piece) :]
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder_fd = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)

    def describe_root(self, root: str, manifest: Mapping[str, Any]) -> None:
        """Note in ``roots/`` what ``root`` stands for; a failure is warned about once."""
        path = self.folder / "roots" / f"{root}.json"
        try:
            if not path.exists():
                with _claimed(path):
                    self._write(path, [memoryview(json.dumps(dict(manifest), indent=1, default=str).encode())])
        except OSError as error:
            self._warn("write", f"cannot write to {self.folder} ({error}); what is computed now is not kept on disk")

    def put(self, block: Block) -> bool:
        """Write ``block`` unless it is there. Returns whether it is there afterwards, or will be in a moment."""
        key, path = block.id.key, self._path(block.id.root, block.id.key)
        try:
            pieces = encode_block(block, self.codec)
            size = sum(piece.nbytes for piece in pieces)
            with _claimed(path):
                try:
                    evicted = self._catalog.reserve(block.id, size, self.budget_bytes)
                    if evicted is None:
                        return self._catalog.has(key)  # another process may be writing it this moment
                    for old_key, old_root in evicted:
                        self._path(old_root, old_key).unlink(missing_ok=True)
                    self._write(path, pieces)
                    self._catalog.ready(key)
                except BaseException:
                    if self._ask(lambda: self._catalog.withdraw(key), True):
                        with contextlib.suppress(OSError):
                            path.unlink(missing_ok=True)
                    raise
            self._lost.discard(key)
            return True
        except NoRoom:
            self._warn(
                "budget",
                f"disk_budget={self.budget_bytes} has no room for a block of {size} bytes after those "
                f"it follows; the rest of such sequences is not kept in {self.folder}",
            )
        except (BlockError, OSError, sqlite3.Error) as error:
            self._warn("write", f"cannot write to {self.folder} ({error}); what is computed now is not kept on disk")
        return False

    def __contains__(self, key: str) -> bool:
        return self.find(key) is not None

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a block that lives here."""
        return self._ask(lambda: self._catalog.find(key), None) if key not in self._lost else None

    def children(self, parent: str) -> Sequence[BlockId]:
        """Return the blocks that follow ``parent``."""
        nothing: list[BlockId] = []
        children = self._ask(lambda: self._catalog.children(parent), nothing)
        return [child for child in children if child.key not in self._lost]

    def open(self, key: str) -> BlockFile | None:
        """Open a block for reading; None when the catalog does not know it.

        Raises:
            BlockError: its file is missing or damaged.
        """
        block = self.find(key)
        if block is None:
            return None
        file = BlockFile(str(self._path(block.root, key)))
        if (file.id.key, file.id.parent, file.id.root) != (key, block.parent, block.root):
            file.close()
            raise BlockError(f"{file.path} holds another block than the catalog says")
        return file

    def discard(self, key: str) -> None:
        """Forget a block and delete its file; unknown keys are ignored."""
        block = self.find(key)
        if block is None:
            return
        self._lost.add(key)  # even if the catalog cannot be written: a damaged block must not be found for ever
        try:
            self._catalog.remove(key)
            self._lost.discard(key)
            self._path(block.root, key).unlink(missing_ok=True)
        except (OSError, sqlite3.Error) as error:
            self._warn("discard", f"cannot delete a block in {self.folder}: {error}")

    def touch(self, keys: Sequence[str]) -> None:
        """Note that these blocks were used now."""
        self._ask(lambda: self._catalog.touch(keys), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all block files, those being written included."""
        return self._ask(lambda: self._catalog.total_bytes, 0)

    def __len__(self) -> int:
        return self._ask(lambda: len(self._catalog), 0)

    def close(self) -> None:
        """Close the catalog."""
        self._catalog.close()


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Name ``path`` as one that this process is writing."""
    place = os.path.realpath(path)
    _in_flight.add(place)
    try:
        yield
    finally:
        _in_flight.discard(place)


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
