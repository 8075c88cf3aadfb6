"""StoreFolder: the paths of a store's files, and how they are written.

kvtier.json                                format version
catalog.sqlite                             rows of blocks and names; can be rebuilt from the rest
blocks/<root>/<kk>/<key>.safetensors       ``kk``: the first two digits of the key, so that no folder grows too large
roots/<root>.json                          the description of a root
roots/<root>.vocabulary                    the text of its token ids
roots/<root>.costs.json                    what computing and loading cost its model, by machine
names/<sha256 of the name>.json            a name and its chain
chats/<sha256 of the name>.json            a conversation that was saved under a name
owners/<process>-<random>.lock             a living store object
leases.lock                                leases on blocks
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import stat
import uuid
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kvtier.errors import BlockError, StoreError, StoreVersionError
from kvtier.kv.codecs import BUILT_IN, Codec
from kvtier.platform.filesystem import READ_FLAGS, LocalFilesystem, is_leftover, is_temporary
from kvtier.store.format.block_file import FORMAT_VERSION, BlockFile, what_failed

_log = logging.getLogger("kvtier.store.disk")
MANIFEST_BYTES = 16 * 2**20  # of the description of a root
COSTS_BYTES = 2**20  # of what was measured with one root
_MARKER_BYTES = 4096
_BLOCK_SUFFIX = ".safetensors"
_VOCABULARY_SUFFIX = ".vocabulary"
_BLOCKS_TO_TRY = 16  # before a folder with a damaged marker counts as no store
_FILES = ("kvtier.json", "catalog.sqlite", "leases.lock")
_PARTS = ("blocks", "roots", "names", "chats", "owners")


class StoreFolder:
    """The files of one store. Only the user can read them (0700, 0600), and no link inside leads elsewhere.

    Args:
        path: the folder; it may be a link itself.
        filesystem: performs all file operations.
        durable: whether written files survive a power cut.
        codecs: the codecs that block files may have, by name.

    Attributes:
        catalog: the database.
        damage_mark: a file that marks the database as damaged: it is rebuilt at the next open.
        leases: the file whose locks tell which blocks are being read.
        owners: the folder of the owners' lock files.

    Raises:
        StoreError: the folder cannot be used.
        StoreVersionError: a newer kvtier wrote it.
    """

    def __init__(
        self, path: Path, filesystem: LocalFilesystem, durable: bool, codecs: Mapping[str, Codec] = BUILT_IN
    ) -> None:
        self.path = path
        self.catalog, self.damage_mark = path / "catalog.sqlite", path / "catalog.damaged"
        self.leases, self.owners = path / "leases.lock", path / "owners"
        self._codecs = codecs
        self.filesystem = filesystem
        self._durable = durable
        self._safe: set[Path] = set()  # folders that exist, and are no links
        try:
            filesystem.make_folder(path, durable=durable)
            for name in (*_FILES, "catalog.sqlite-wal", "catalog.sqlite-shm", *_PARTS):
                filesystem.refuse_links(path, path / name)
            self._check_version()
            for name in _PARTS:
                filesystem.make_folder(path / name, durable=durable)
                if stat.S_IMODE((path / name).stat().st_mode) & 0o077:
                    (path / name).chmod(0o700)
            probe = path / f".probe-{uuid.uuid4().hex}"
            filesystem.write_whole(probe, [], durable=False)
            filesystem.delete(probe)
        except NotADirectoryError as error:
            what = f"{error.filename or path} is a file, and a store is a folder"
            raise StoreError(f"cannot keep a store in {path}: {what}; pass a folder you can write to") from error
        except OSError as error:
            raise StoreError(f"cannot keep a store in {path}: {error}; pass a folder you can write to") from error

    def _check_version(self) -> None:
        marker = self.path / "kvtier.json"
        try:
            version = read_record(marker, _MARKER_BYTES)["format_version"]
            if type(version) is not int:
                raise ValueError(f"format_version {version!r}")
        except FileNotFoundError:
            self._write_marker(marker)
            return
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if not self._has_blocks():
                raise StoreError(f"{marker} is not the marker of a store ({error}); pass an empty folder") from error
            _log.warning("%s is damaged (%s); its blocks show what it was, and it is rewritten", marker, error)
            self._write_marker(marker)
            return
        if version > FORMAT_VERSION:
            raise StoreVersionError(
                f"{self.path} was written by a newer kvtier (format {version}, this one reads {FORMAT_VERSION}); "
                "update kvtier or pass another folder"
            )

    def _write_marker(self, marker: Path) -> None:
        # Durable in any case: a folder whose marker is lost could not be opened again.
        text = json.dumps({"format_version": FORMAT_VERSION}, indent=1)
        self.filesystem.write_whole(marker, [memoryview(text.encode())], durable=True)

    def _has_blocks(self) -> bool:
        """Whether there is a whole block file of this format among the first few."""
        for path in itertools.islice(self.block_files(), _BLOCKS_TO_TRY):
            try:
                BlockFile(str(path), codecs=self._codecs).close()
            except BlockError:
                continue
            return True
        return False

    @property
    def parts(self) -> list[Path]:
        """The files and folders that every store has."""
        return [self.path / name for name in (*_PARTS, *_FILES)]

    def block(self, key: str, root: str) -> Path:
        """Return the file of a block."""
        return self.path / "blocks" / root / key[:2] / f"{key}{_BLOCK_SUFFIX}"

    def root(self, root: str) -> Path:
        """Return the file that describes a root."""
        return self.path / "roots" / f"{root}.json"

    def costs(self, root: str) -> Path:
        """Return the file with the costs of a root."""
        return self.path / "roots" / f"{root}.costs.json"

    def vocabulary(self, root: str) -> Path:
        """Return the file with the texts of the token ids of a root."""
        return self.path / "roots" / f"{root}{_VOCABULARY_SUFFIX}"

    def vocabularies(self) -> list[tuple[str, Path]]:
        """Return the roots that have a vocabulary, and its file."""
        found = sorted((self.path / "roots").glob(f"*{_VOCABULARY_SUFFIX}"))
        return [(path.name.removesuffix(_VOCABULARY_SUFFIX), path) for path in found]

    def forget_roots(self, but: Container[str]) -> None:
        """Delete the files of all roots but some.

        Raises:
            OSError: a file cannot be deleted.
        """
        for path in sorted((self.path / "roots").iterdir()):
            if not path.name.startswith(".") and path.name.split(".")[0] not in but:
                self.filesystem.delete(path)

    def name(self, name: str) -> Path:
        """Return the file of ``name``, which holds its chain."""
        return self.path / "names" / f"{hashlib.sha256(name.encode()).hexdigest()}.json"

    def names(self) -> list[Path]:
        """Return the files of all names."""
        return sorted((self.path / "names").glob("*.json"))

    def chat(self, name: str) -> Path:
        """Return the file of the chat ``name``."""
        return self.path / "chats" / self.name(name).name

    def chats(self) -> list[Path]:
        """Return the files of all chats."""
        return sorted((self.path / "chats").glob("*.json"))

    def block_files(self, unlisted: list[str] | None = None) -> Iterator[Path]:
        """Yield every block file. Links are not followed. Folders that cannot be listed now go to ``unlisted``."""
        for path in _files(self.path / "blocks", 2, unlisted):
            if path.suffix == _BLOCK_SUFFIX:
                yield path

    def leftovers(self, *, blocks: bool = True) -> Iterator[Path]:
        """Yield the temporary files of dead writers; without ``blocks``, only those outside ``blocks/``."""
        places = [(self.path, 0), (self.path / "roots", 0), (self.path / "names", 0), (self.path / "chats", 0)]
        for folder, depth in places + [(self.path / "blocks", 2)] * blocks:
            for path in _files(folder, depth):
                if path.name.startswith(".") and is_leftover(path):
                    yield path

    def leftovers_beside(self, path: Path, pid: int) -> Iterator[Path]:
        """Yield the temporary files that the dead process ``pid`` has left of writing ``path``."""
        for other in _files(path.parent, 0):
            if other.name.startswith(f".{path.name}-{pid}-") and is_temporary(other):
                yield other

    def write(self, path: Path, pieces: Sequence[memoryview]) -> None:
        """Write ``pieces`` to ``path``: whole, or not at all.

        Raises:
            OSError: it cannot be written, or a link is in the way.
        """
        try:
            self._write(path, pieces)
        except FileNotFoundError:  # the folder was deleted after it was made
            self._safe.clear()
            self._write(path, pieces)

    def _write(self, path: Path, pieces: Sequence[memoryview]) -> None:
        folder = path.parent
        if folder not in self._safe:
            self.filesystem.refuse_links(self.path, folder)
            self.filesystem.make_folder(folder, durable=self._durable)
            self._safe.add(folder)
        self.filesystem.write_whole(path, pieces, self._durable)

    def write_json(self, path: Path, values: Mapping[str, Any]) -> None:
        """Write ``values`` as JSON.

        Raises:
            OSError: it cannot be written.
        """
        text = json.dumps(dict(values), indent=1, default=str)
        self.filesystem.write_whole(path, [memoryview(text.encode())], self._durable)

    def block_file(self, path: Path) -> BlockFile:
        """Open the block file at ``path``.

        Raises:
            UnavailableError: it cannot be read now.
            BlockError: it is missing, or damaged.
        """
        return BlockFile(str(path), lambda: self._open(path), partial(self.unusable, path), self._codecs)

    def _open(self, path: Path) -> int:
        """Open a file for reading, if its path has no link; return its descriptor."""
        if path.parent not in self._safe:
            self.filesystem.refuse_links(self.path, path.parent)
            self._safe.add(path.parent)
        return self.filesystem.open_read(path)

    def unusable(self, path: Path, error: OSError | MemoryError) -> BlockError:
        """Return the error that a failed system call means for the block file ``path``.

        A file counts as missing only if the folder can be reached now.
        """
        if isinstance(error, FileNotFoundError) and self._is_there():
            return BlockError(f"{path} is missing")
        return what_failed(path, error)

    def _is_there(self) -> bool:
        try:
            return stat.S_ISREG((self.path / "kvtier.json").stat().st_mode)
        except OSError:
            return False

    def allocated_bytes(self, nbytes: int) -> int:
        """Return how many bytes a file of ``nbytes`` takes on the drive."""
        return self.filesystem.allocated_bytes(self.path, nbytes)

    def free_bytes(self) -> int:
        """Return how many bytes may still be written to the drive."""
        return self.filesystem.free_bytes(self.path)


def read_record(path: Path, at_most_bytes: int) -> Any:
    """Return the parsed JSON file ``path``, a record of a store.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, or is a link.
        ValueError: it is not JSON, not a regular file, or larger than ``at_most_bytes``.
        RecursionError: it is nested too deeply.
    """
    return json.loads(read_bytes(path, at_most_bytes).decode("utf-8"))


def read_bytes(path: Path, at_most_bytes: int) -> bytes:
    """Return the content of ``path``, a file of a store.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, or is a link.
        ValueError: it is no regular file (a pipe would never end), or larger than ``at_most_bytes``.
    """
    fd = os.open(path, READ_FLAGS)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no ordinary file")
        data = file.read(at_most_bytes + 1)
    if len(data) > at_most_bytes:
        raise ValueError("it is too large")
    return data


def _files(folder: Path, depth: int, unlisted: list[str] | None = None) -> Iterator[Path]:
    """Yield the files that lie ``depth`` folders below ``folder``. Links are left out."""
    try:
        with os.scandir(folder) as entries:
            found = [
                (Path(entry.path), entry.is_dir(follow_symlinks=False)) for entry in entries if not entry.is_symlink()
            ]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if unlisted is not None:
            unlisted.append(f"{folder}: {error}")
        return
    for path, is_folder in sorted(found):
        if is_folder and depth:
            yield from _files(path, depth - 1, unlisted)
        elif not is_folder and not depth:
            yield path
