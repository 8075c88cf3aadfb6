"""Files and folders of a store: written whole or not at all, private to the user, never through a link.

Errors of a real drive come from one of six system calls. ``SystemCalls`` holds them, so that a test can make any
single call fail, be cut short, or be the last call of a process. ``mounts.py`` tells the type of a drive.
Also here: folders that users name, as absolute paths, and the default folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path

from kvtier.errors import ConfigurationError
from kvtier.platform.descriptors import OF_THIS_PROCESS
from kvtier.platform.mounts import mounted_kind

# Never through a link; and opening a pipe in the place of a file must not wait for its writer.
READ_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_FOLDER_MODE = 0o700
_FILE_MODE = 0o600
_STAT_BLOCK_BYTES = 512  # the unit of ``st_blocks``, whatever the drive
_FOREIGN = "and holds files that kvtier did not write; move them away"
_TEMPORARY = re.compile(r"\.(?P<name>.+)-(?P<pid>\d{1,10})-[0-9a-f]{32}\.tmp")
# Temporary files of this process. A restarted container often has the process id of its predecessor: a temporary file
# with our own id that is not in here was left by a dead process.
_being_written: set[str] = set()


class SystemCalls:
    """The system calls that change or open files and folders. Each acts as its namesake in ``os``."""

    def open(self, path: Path, flags: int, mode: int = 0) -> int:
        """Open ``path``; as always in Python, other programs do not inherit the descriptor."""
        return os.open(path, flags, mode)

    def write(self, fd: int, piece: memoryview) -> int:
        """Write as much of ``piece`` as one call takes; return the number of bytes."""
        return os.write(fd, piece)

    def fsync(self, fd: int) -> None:
        """Wait until the drive holds the file or folder."""
        os.fsync(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file, in place of any file of the new name."""
        old.replace(new)

    def unlink(self, path: Path) -> None:
        """Delete a file."""
        path.unlink()

    def mkdir(self, path: Path, mode: int) -> None:
        """Make one folder."""
        path.mkdir(mode)


class LocalFilesystem:
    """The drive operations of a store. Thread-safe. Methods raise ``OSError`` as the system does.

    Args:
        calls: the system calls that change or open files and folders.
    """

    def __init__(self, calls: SystemCalls | None = None) -> None:
        self._calls = calls or SystemCalls()
        self._allocation_units: dict[str, int] = {}

    def make_folder(self, path: Path, *, durable: bool = False) -> None:
        """Make a folder that only the user can enter (0700 whatever the umask), and its missing parents.

        An existing folder is left as it is. With ``durable`` a new folder survives a power cut.

        Raises:
            NotADirectoryError: ``path`` exists and is not a folder.
        """
        if path.is_dir():
            return
        if path.parent != path:
            self.make_folder(path.parent, durable=durable)
        try:
            self._calls.mkdir(path, _FOLDER_MODE)
        except FileExistsError:  # made by another process meanwhile, or not a folder
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "is in the way, and no folder", str(path)) from None
            return
        if stat.S_IMODE(path.stat().st_mode) & _FOLDER_MODE != _FOLDER_MODE:  # masked by the umask
            path.chmod(_FOLDER_MODE)
        if durable:
            self._sync_folder(path.parent)

    def write_whole(self, path: Path, pieces: Sequence[memoryview], durable: bool) -> None:
        """Write a file with all bytes of ``pieces`` at ``path``, in place of any file there.

        A reader sees the old file or the new one, never a part, also after this process was killed; with
        ``durable`` also after a power cut. Only the user can read it (0600 whatever the umask).

        Raises:
            OSError: no temporary file stays behind unless it cannot be deleted either. ``path`` holds its old content,
                or (if only the folder could not be made durable) the whole new file.
        """
        temporary = path.with_name(f".{path.name}-{os.getpid()}-{uuid.uuid4().hex}.tmp")
        place = os.path.realpath(temporary)
        _being_written.add(place)
        try:
            self._write_new(temporary, pieces, durable)
            self._calls.rename(temporary, path)
        except BaseException:
            # The caller should get the first error. A file that cannot be deleted now is a leftover.
            with contextlib.suppress(OSError):
                self._calls.unlink(temporary)
            raise
        finally:
            _being_written.discard(place)
        if durable:
            self._sync_folder(path.parent)

    def _write_new(self, path: Path, pieces: Sequence[memoryview], durable: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fd = OF_THIS_PROCESS.open(lambda: self._calls.open(path, flags, _FILE_MODE))
        try:
            if stat.S_IMODE(os.fstat(fd).st_mode) & _FILE_MODE != _FILE_MODE:  # masked by the umask
                os.fchmod(fd, _FILE_MODE)
            for piece in pieces:
                rest = piece.cast("B")
                while rest.nbytes:
                    written = self._calls.write(fd, rest)
                    if written <= 0:
                        raise OSError(errno.EIO, "the drive takes no more bytes, and does not say why", str(path))
                    rest = rest[written:]
            if durable:
                self._calls.fsync(fd)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is raised
                os.close(fd)
            raise
        os.close(fd)  # a full network drive may report the error here

    def _sync_folder(self, folder: Path) -> None:
        fd = self._calls.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._calls.fsync(fd)
        finally:
            os.close(fd)

    def delete(self, path: Path) -> bool:
        """Delete a file, or an empty folder in its place; return whether it existed.

        Raises:
            OSError: it cannot be deleted, or a folder with files, which are not of the store, is in its place.
        """
        try:
            self._calls.unlink(path)
        except FileNotFoundError:
            return False
        except OSError:  # EISDIR, or EPERM as POSIX has it
            if not path.is_dir() or path.is_symlink():
                raise
            try:
                path.rmdir()
            except OSError as error:
                raise OSError(error.errno, f"is a folder, {_FOREIGN}", str(path)) from None
        return True

    def open_read(self, path: Path) -> int:
        """Return a file descriptor for reading; the caller closes it.

        Raises:
            OSError: ``ELOOP`` where ``path`` is a symbolic link.
        """
        return self._calls.open(path, READ_FLAGS)

    def allocated_bytes(self, folder: Path, nbytes: int) -> int:
        """Return the bytes that a file of ``nbytes`` below ``folder`` takes, in whole allocation units of its drive."""
        unit = self._allocation_units.get(str(folder))
        if unit is None:
            drive = os.statvfs(folder)
            unit = self._allocation_units[str(folder)] = drive.f_frsize or drive.f_bsize or 1
        return -(-nbytes // unit) * unit

    def used_bytes(self, path: Path) -> int:
        """Return the bytes that the file at ``path`` takes on its drive: as reported, at least ``allocated_bytes``.

        A drive reports more than ``allocated_bytes`` if it allocates larger pieces than it states; it reports less
        while a file is not written out yet, or if it compresses.
        """
        found = path.lstat()
        told = getattr(found, "st_blocks", 0) * _STAT_BLOCK_BYTES
        return max(told, self.allocated_bytes(path.parent, found.st_size))

    def free_bytes(self, folder: Path) -> int:
        """Return how many bytes a user without privileges may still write to the drive of ``folder``."""
        drive = os.statvfs(folder)
        return drive.f_bavail * (drive.f_frsize or drive.f_bsize)

    def kind(self, folder: Path) -> str | None:
        """Return the type of the filesystem of ``folder``, e.g. ``ext4``; None where the system does not tell."""
        return mounted_kind(folder)

    def refuse_links(self, folder: Path, path: Path) -> None:
        """Check that no part of ``path`` below ``folder`` is a link; ``folder`` itself may be one.

        A missing part is no link.

        Raises:
            OSError: ``ELOOP``: a part of ``path`` below ``folder`` is a symbolic link.
            ValueError: ``path`` does not lie below ``folder``.
        """
        parts = path.relative_to(folder).parts
        if ".." in parts:
            raise ValueError(f"{str(path)!r} does not lie below {str(folder)!r}")
        place = folder
        for part in parts:
            place = place / part
            if place.is_symlink():
                text = "is a symbolic link inside a store, which could lead anywhere; delete the link"
                raise OSError(errno.ELOOP, text, str(place))


LOCAL = LocalFilesystem()


def is_temporary(path: Path) -> bool:
    """Whether ``path`` has the name of a temporary file of ``write_whole``."""
    return _TEMPORARY.fullmatch(path.name) is not None


def is_leftover(path: Path) -> bool:
    """Whether ``path`` is a temporary file whose writer is gone, so that it will never be finished."""
    name = _TEMPORARY.fullmatch(path.name)
    if name is None:
        return False
    if int(name["pid"]) == os.getpid():
        return os.path.realpath(path) not in _being_written
    return not is_alive(int(name["pid"]))


def is_alive(pid: int) -> bool:
    """Whether a process ``pid`` runs on this machine."""
    if not 0 < pid < 2**31:  # ``kill`` would take it for a process group, or refuse it
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True


def folder_path(value: str | os.PathLike[str], argument: str) -> Path:
    """Return ``value`` as the absolute path of a folder, independent of later changes of the current folder.

    Raises:
        ConfigurationError: it is not a path; it is empty, which would be the current folder; or it begins with the
            home of a user without one. The message names ``argument``.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ConfigurationError(f"{argument}={value!r} is not the path of a folder.")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigurationError(f"{argument}={value!r}: {error}; set HOME, or pass an absolute path.") from error
    except OSError as error:  # the current folder is gone
        raise ConfigurationError(f"{argument}={value!r} is relative to a folder that is gone ({error}).") from error


def user_cache_folder(argument: str) -> Path:
    """Return the user's cache folder.

    Raises:
        ConfigurationError: the user has none; the message says to pass ``argument``.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return folder_path(base, "XDG_CACHE_HOME")
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigurationError(f"{error}; set HOME, or pass {argument}=….") from error
