"""``LocalFilesystem``, the interface between the store and its folder."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from kvtier.platform.filesystem import LOCAL, LocalFilesystem, SystemCalls, is_alive, is_leftover, is_temporary

PIECES = [memoryview(b"one "), memoryview(b""), memoryview(bytes(range(8))).cast("H"), memoryview(b"last")]
WHOLE = b"one " + bytes(range(8)) + b"last"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextlib.contextmanager
def umask(bits: int):
    before = os.umask(bits)
    try:
        yield
    finally:
        os.umask(before)


class Told(SystemCalls):
    """Records its calls; a call named ``fail`` raises ``error`` before it is done."""

    def __init__(self, fail: str = "", error: int = errno.EIO, short: int = 0) -> None:
        self.asked: list[tuple[str, str]] = []
        self.fail, self.error, self.short = fail, error, short
        self.names: dict[int, str] = {}

    def _tell(self, call: str, subject: str) -> None:
        self.asked.append((call, subject))
        if call == self.fail:
            raise OSError(self.error, os.strerror(self.error))

    def open(self, path, flags, mode=0):
        self._tell("open", path.name)
        fd = super().open(path, flags, mode)
        self.names[fd] = path.name
        return fd

    def write(self, fd, piece):
        self._tell("write", self.names[fd])
        return super().write(fd, piece[: self.short] if self.short else piece)

    def fsync(self, fd):
        self._tell("fsync", self.names[fd])
        super().fsync(fd)

    def rename(self, old, new):
        self._tell("rename", new.name)
        super().rename(old, new)

    def unlink(self, path):
        self._tell("unlink", path.name)
        super().unlink(path)

    def mkdir(self, path, mode):
        self._tell("mkdir", path.name)
        super().mkdir(path, mode)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0o000, 0o022, 0o077, 0o777], ids=oct)
@pytest.mark.parametrize("durable", [True, False])
def test_written_file_is_complete_and_private_to_the_user(tmp_path, bits, durable):
    path = tmp_path / "file"
    with umask(bits):
        LOCAL.write_whole(path, PIECES, durable)
    assert path.read_bytes() == WHOLE
    assert mode(path) == 0o600
    LOCAL.write_whole(path, [memoryview(b"new")], durable)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_durable_write_syncs_the_file_before_and_the_folder_after_the_rename(tmp_path):
    calls = Told()
    LocalFilesystem(calls).write_whole(tmp_path / "file", PIECES[:1], durable=True)
    steps = [call if subject != tmp_path.name else f"{call} folder" for call, subject in calls.asked]
    assert steps == ["open", "write", "fsync", "rename", "open folder", "fsync folder"]
    lazy = Told()
    LocalFilesystem(lazy).write_whole(tmp_path / "file", PIECES[:1], durable=False)
    assert [call for call, _ in lazy.asked] == ["open", "write", "rename"]


def test_short_writes_are_continued(tmp_path):
    LocalFilesystem(Told(short=3)).write_whole(tmp_path / "file", PIECES, durable=False)
    assert (tmp_path / "file").read_bytes() == WHOLE


def test_write_without_progress_raises_and_leaves_no_file(tmp_path):
    class Stuck(SystemCalls):
        def write(self, fd, piece):
            return 0

    with pytest.raises(OSError, match="takes no more bytes"):
        LocalFilesystem(Stuck()).write_whole(tmp_path / "file", PIECES, durable=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS], ids=os.strerror)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
def test_failed_write_leaves_the_old_file_untouched(tmp_path, call, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    descriptors = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(OSError, match=os.strerror(error)) as caught:
        LocalFilesystem(Told(call, error)).write_whole(path, PIECES, durable=True)
    assert caught.value.errno == error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert len(list(Path("/dev/fd").iterdir())) == descriptors


def test_new_file_is_in_place_even_if_the_folder_sync_fails(tmp_path):
    class Folderless(Told):
        def fsync(self, fd):
            if self.names[fd] == tmp_path.name:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    descriptors = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        LocalFilesystem(Folderless()).write_whole(tmp_path / "file", PIECES, durable=True)
    assert (tmp_path / "file").read_bytes() == WHOLE
    assert len(list(Path("/dev/fd").iterdir())) == descriptors


def test_temporary_file_that_cannot_be_deleted_is_a_leftover(tmp_path):
    class Worn(Told):
        def unlink(self, path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        LocalFilesystem(Worn("rename", errno.ENOSPC)).write_whole(tmp_path / "file", PIECES, durable=False)
    (left,) = tmp_path.iterdir()
    assert is_leftover(left)


def test_file_being_written_is_temporary_but_no_leftover(tmp_path):
    seen = []

    class Watched(SystemCalls):
        def rename(self, old, new):
            seen.append((is_temporary(old), is_leftover(old), old.parent == new.parent))
            super().rename(old, new)

    LocalFilesystem(Watched()).write_whole(tmp_path / "file", PIECES, durable=False)
    assert seen == [(True, False, True)]
    assert not is_temporary(tmp_path / "file")
    assert not is_leftover(tmp_path / "file")


def test_leftover_is_a_temporary_file_of_a_dead_process_or_this_one():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert is_leftover(Path(f".file-{done.pid}-{'0' * 32}.tmp"))
    assert is_leftover(Path(f".file-{os.getpid()}-{'0' * 32}.tmp"))
    assert not is_leftover(Path(f".file-{os.getppid()}-{'0' * 32}.tmp"))
    assert not is_leftover(Path(f".file-{done.pid}-{'0' * 31}.tmp"))
    assert is_alive(os.getpid())
    assert not any(map(is_alive, (0, -1, done.pid, 2**31, 9_999_999_999)))


def test_process_of_another_user_counts_as_alive(monkeypatch):
    def kill(pid, signal):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "kill", kill)
    assert is_alive(1)


def test_delete_reports_whether_the_file_existed(tmp_path):
    (tmp_path / "file").touch()
    assert LOCAL.delete(tmp_path / "file") is True
    assert LOCAL.delete(tmp_path / "file") is False
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        LocalFilesystem(Told("unlink", errno.EROFS)).delete(tmp_path / "file")


def test_open_read_does_not_follow_symbolic_links(tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        LOCAL.open_read(tmp_path / "link")
    fd = LOCAL.open_read(tmp_path / "secret")
    assert os.read(fd, 2) == b"x"
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_write_replaces_a_symbolic_link_without_following_it(tmp_path):
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "file").symlink_to(tmp_path / "theirs")
    LOCAL.write_whole(tmp_path / "file", PIECES, durable=False)
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert (tmp_path / "file").read_bytes() == WHOLE
    assert not (tmp_path / "file").is_symlink()


def test_write_refuses_an_existing_temporary_file(tmp_path, monkeypatch):
    """Guessing the name of the temporary file lets no data into the store and none out of it."""
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=1))
    guessed = tmp_path / f".file-{os.getpid()}-{uuid.UUID(int=1).hex}.tmp"
    (tmp_path / "theirs").write_bytes(b"theirs")
    guessed.symlink_to(tmp_path / "theirs")
    with pytest.raises(FileExistsError):
        LOCAL.write_whole(tmp_path / "file", PIECES, durable=False)
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert not (tmp_path / "file").exists()


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0o000, 0o022, 0o777], ids=oct)
def test_new_folders_are_private_to_the_user(tmp_path, bits):
    with umask(bits):
        LOCAL.make_folder(tmp_path / "a" / "b", durable=True)
    assert mode(tmp_path / "a") == mode(tmp_path / "a" / "b") == 0o700


def test_existing_folder_keeps_its_mode(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o755)
    calls = Told()
    LocalFilesystem(calls).make_folder(tmp_path / "a", durable=True)
    assert mode(tmp_path / "a") == 0o755
    assert calls.asked == []


def test_durable_new_folder_syncs_its_parent_folder(tmp_path):
    calls = Told()
    LocalFilesystem(calls).make_folder(tmp_path / "a" / "b", durable=True)
    assert calls.asked == [
        ("mkdir", "a"),
        ("open", tmp_path.name),
        ("fsync", tmp_path.name),
        ("mkdir", "b"),
        ("open", "a"),
        ("fsync", "a"),
    ]


def test_making_a_folder_that_appears_meanwhile_succeeds(tmp_path):
    class Second(SystemCalls):
        def mkdir(self, path, mode):
            super().mkdir(path, mode)  # by the other process
            super().mkdir(path, mode)

    LocalFilesystem(Second()).make_folder(tmp_path / "a")
    assert (tmp_path / "a").is_dir()


def test_make_folder_raises_if_a_file_is_in_the_way(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(NotADirectoryError, match=r"is in the way.*/a'"):
        LOCAL.make_folder(tmp_path / "a" / "b")


def test_links_inside_a_store_are_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "real" / "blocks").mkdir(parents=True)
    store = tmp_path / "store"
    store.symlink_to(tmp_path / "real")  # the user's own choice
    LOCAL.refuse_links(store, store / "blocks" / "aa" / "not there")
    (store / "blocks" / "aa").symlink_to(outside)
    for path in (store / "blocks" / "aa", store / "blocks" / "aa" / "key"):
        with pytest.raises(OSError, match=r"is a symbolic link inside a store.*/blocks/aa'") as caught:
            LOCAL.refuse_links(store, path)
        assert caught.value.errno == errno.ELOOP
    (store / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="symbolic link"):
        LOCAL.refuse_links(store, store / "dangling")


@pytest.mark.parametrize("path", ["../else", "store/../../else", "store/blocks/../../../else"])
def test_paths_outside_a_store_are_refused(tmp_path, path):
    with pytest.raises(ValueError, match="store"):
        LOCAL.refuse_links(tmp_path / "store", tmp_path / path)


# --- disk space -------------------------------------------------------------------------------------------------------


def test_allocated_bytes_are_whole_units_of_the_drive(tmp_path):
    drive = os.statvfs(tmp_path)
    unit = drive.f_frsize
    for nbytes, units in ((0, 0), (1, 1), (unit, 1), (unit + 1, 2), (10 * unit, 10)):
        assert LOCAL.allocated_bytes(tmp_path, nbytes) == units * unit


def test_allocation_unit_of_a_drive_is_queried_once(tmp_path, monkeypatch):
    filesystem = LocalFilesystem()
    expected = filesystem.allocated_bytes(tmp_path, 1)
    monkeypatch.delattr(os, "statvfs")
    assert filesystem.allocated_bytes(tmp_path, 1) == expected


def test_free_bytes_count_only_the_space_available_to_the_user(tmp_path):
    drive = os.statvfs(tmp_path)
    free = LOCAL.free_bytes(tmp_path)
    assert 0 <= free <= drive.f_bfree * drive.f_frsize
    assert abs(free - drive.f_bavail * drive.f_frsize) < 2**30
    with pytest.raises(FileNotFoundError):
        LOCAL.free_bytes(tmp_path / "missing")
