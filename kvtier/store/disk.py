"""The file tier: one safetensors file a block, under a byte budget, found through the catalog."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kvtier.errors import BlockError, StoreError, StoreVersionError
from kvtier.store.base import Block
from kvtier.store.catalog import Catalog
from kvtier.store.chain import BlockId
from kvtier.store.format import FORMAT_VERSION, BlockFile, encode_block

_log = logging.getLogger("kvtier.store.disk")
T = TypeVar("T")


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
        except FileNotFoundError:
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
        existed = path.exists()
        try:
            catalog = Catalog(path)
            if existed:
                catalog.total_bytes  # noqa: B018  a damaged file shows on the first read
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise StoreError(f"cannot open {path}: {error}") from error
            self._warn("catalog", f"{path} is damaged ({error}); it is made anew from the block files")
            for suffix in ("", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            existed = False
            catalog = Catalog(path)
        if not existed:
            self._rebuild(catalog)
        self._sweep(catalog)
        return catalog

    def _rebuild(self, catalog: Catalog) -> None:
        for path in sorted((self.folder / "blocks").glob("*/*/*.safetensors")):
            try:
                file = BlockFile(str(path))
            except BlockError as error:
                self._warn(str(path), f"{error}; removed")
                path.unlink(missing_ok=True)
                continue
            file.close()
            catalog.adopt(file.id, file.nbytes)

    def _sweep(self, catalog: Catalog) -> None:
        """Drop what processes that died while writing have left."""
        for key, writer in catalog.writers():
            if writer != os.getpid() and not _alive(writer):
                catalog.remove(key)
        for path in (self.folder / "blocks").glob("*/*/.*.tmp"):
            if not _alive(int(path.name.split("-")[1]) if path.name.count("-") >= 2 else 0):
                path.unlink(missing_ok=True)

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
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
                self._write(path, [memoryview(json.dumps(dict(manifest), indent=1, default=str).encode())])
        except OSError as error:
            self._warn("write", f"cannot write to {self.folder} ({error}); what is computed now is not kept on disk")

    def put(self, block: Block) -> bool:
        """Write ``block`` unless it is there. Returns whether it is there afterwards."""
        key, root = block.id.key, block.id.root
        try:
            pieces = encode_block(block, self.codec)
            evicted = self._catalog.reserve(block.id, sum(piece.nbytes for piece in pieces), self.budget_bytes)
            if evicted is None:
                return self._catalog.find(key) is not None
            try:
                for old_key, old_root in evicted:
                    self._path(old_root, old_key).unlink(missing_ok=True)
                self._write(self._path(root, key), pieces)
                self._catalog.ready(key)
            except BaseException:
                self._ask(lambda: self._catalog.remove(key), None)
                raise
            return True
        except (OSError, sqlite3.Error) as error:
            self._warn("write", f"cannot write to {self.folder} ({error}); what is computed now is not kept on disk")
            return False

    def __contains__(self, key: str) -> bool:
        return self.find(key) is not None

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a block that lives here."""
        return self._ask(lambda: self._catalog.find(key), None)

    def children(self, parent: str) -> Sequence[BlockId]:
        """Return the blocks that follow ``parent``."""
        return self._ask(lambda: self._catalog.children(parent), [])

    def open(self, key: str) -> BlockFile | None:
        """Open a block for reading; None when the catalog does not know it.

        Raises:
            BlockError: its file is missing or damaged.
        """
        block = self.find(key)
        return BlockFile(str(self._path(block.root, key))) if block else None

    def discard(self, key: str) -> None:
        """Forget a block and delete its file; unknown keys are ignored."""
        block = self.find(key)
        if block is None:
            return
        self._ask(lambda: self._catalog.remove(key), None)
        try:
            self._path(block.root, key).unlink(missing_ok=True)
        except OSError as error:
            self._warn(key, f"cannot delete a block file in {self.folder}: {error}")

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
