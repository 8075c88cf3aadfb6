"""A block that cannot be opened or read now is a miss and deletes nothing; only a failed check is damage."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from kvtier import PrefixStore
from kvtier.errors import BlockError, UnavailableError
from kvtier.platform.filesystem import LocalFilesystem, SystemCalls
from kvtier.store.block import Block
from kvtier.store.chain import TokenIds
from kvtier.store.format import block_file
from kvtier.store.format.block_file import encode_block
from tests.support.stores import ROOT, chain, commit, count, restored_length

KNOWN = 18
ERRNOS = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)


class Refusing(SystemCalls):
    """Refuses to open block files while ``error`` is set."""

    error: OSError | None = None

    def open(self, path: Path, flags: int, mode: int = 0) -> int:
        if self.error is not None and path.suffix == ".safetensors" and not flags & os.O_CREAT:
            raise self.error
        return super().open(path, flags, mode)


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def refusing():
    return Refusing()


@pytest.fixture
def reopened(tmp_path, clock, refusing):
    """A store with ``KNOWN`` tokens in files and none in RAM."""
    settings = {"block_size": 4, "host_budget": 1, "clock": clock, "filesystem": LocalFilesystem(refusing)}
    with PrefixStore(tmp_path / "kv", **settings) as store:
        commit(store, count(KNOWN))
    with PrefixStore(tmp_path / "kv", **settings) as store:
        yield store


def files(store: PrefixStore) -> list[Path]:
    return sorted(store.path.rglob("*.safetensors"))


def attempt(store: PrefixStore, tokens: TokenIds | None = None) -> int:
    """Restore as a turn does: the next match leaves out unusable blocks. Return the number of restored tokens."""
    for _ in range(20):
        try:
            return restored_length(store, count(KNOWN) if tokens is None else tokens)
        except BlockError:
            continue
    raise AssertionError("it is matched again and again")


def fail_to_open(error, refusing, monkeypatch):
    refusing.error = error


def fail_to_read(error, refusing, monkeypatch):
    def preadv(*_):
        raise error

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("fail", [fail_to_open, fail_to_read])
def test_os_error_on_open_or_read_is_a_miss_not_damage(reopened, clock, refusing, monkeypatch, caplog, fail, number):
    before = files(reopened)
    with monkeypatch.context() as patched:
        fail(OSError(number, os.strerror(number)), refusing, patched)
        assert attempt(reopened) == 0
        assert attempt(reopened) == 0
    refusing.error = None
    assert files(reopened) == before
    assert reopened.stats().misses["unavailable"] > 0
    assert "damaged" not in reopened.stats().misses
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    clock.now += 1.5
    assert attempt(reopened) == KNOWN


def test_memory_error_during_a_read_is_a_miss_and_deletes_nothing(reopened, clock, monkeypatch):
    before, empty = files(reopened), np.empty

    def none_left(shape, *args, **kwargs):
        if np.prod(shape) >= 64:  # token ids are smaller
            raise MemoryError
        return empty(shape, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(np, "empty", none_left)
        patched.setattr(block_file, "_MAX_PIECES", 0)  # each page is read into memory of its own
        assert attempt(reopened) == 0
    assert files(reopened) == before
    clock.now += 1.5
    assert attempt(reopened) == KNOWN


def test_block_that_keeps_failing_is_tried_less_often(reopened, clock, refusing):
    refusing.error = OSError(errno.EACCES, "no")
    tries = []
    for _ in range(40):
        clock.now += 1.0
        before = reopened.stats().misses.get("unavailable", 0)
        attempt(reopened)
        tries.append(reopened.stats().misses["unavailable"] > before)
    assert 4 <= sum(tries) <= 10


def test_unreachable_folder_is_not_taken_for_empty(reopened, clock):
    """After an unmount or a rename of the folder, every file seems to be missing."""
    reopened.path.rename(away := reopened.path.with_name("away"))
    assert attempt(reopened) == 0
    away.rename(reopened.path)
    clock.now += 1.5
    assert attempt(reopened) == KNOWN


def test_missing_block_file_shortens_the_match_and_counts_as_damaged(reopened):
    files(reopened)[0].unlink()
    assert attempt(reopened) < KNOWN
    assert reopened.stats().misses["damaged"] == 1


def test_commit_does_not_rewrite_blocks_that_cannot_be_read_now(reopened, clock, refusing):
    """A turn that had to compute the tokens again commits them, but their unreadable files still exist."""
    refusing.error = OSError(errno.EMFILE, "too many")
    before = {path: path.stat().st_ino for path in files(reopened)}
    assert attempt(reopened) == 0
    commit(reopened, count(KNOWN))
    reopened.flush()
    assert {path: path.stat().st_ino for path in files(reopened)} == before


def test_rebuilding_the_catalog_keeps_files_it_cannot_read(reopened, clock, refusing, caplog):
    path, before = reopened.path, files(reopened)
    reopened.close()
    settings = {"block_size": 4, "host_budget": 1, "clock": clock, "filesystem": LocalFilesystem(refusing)}
    for file in path.glob("catalog.sqlite*"):
        file.unlink()
    refusing.error = OSError(errno.EMFILE, "too many")
    with PrefixStore(path, **settings) as store:
        assert files(store) == before
        assert attempt(store) == 0
    assert "looked at again at the next open" in caplog.text
    refusing.error = None
    with PrefixStore(path, **settings) as store:
        assert attempt(store) == KNOWN


def test_verify_reports_unreadable_files_without_removing_them(reopened, refusing):
    before = files(reopened)
    refusing.error = OSError(errno.EACCES, "no")
    report = reopened.verify(repair=True)
    assert {problem.kind for problem in report.problems} == {"unreadable"}
    assert not any(problem.repaired for problem in report.problems)
    assert files(reopened) == before


@pytest.mark.parametrize("number", [errno.ELOOP, errno.EISDIR, errno.ENXIO])
def test_block_path_that_is_no_regular_file_counts_as_damaged(reopened, refusing, number):
    """A link, a folder or a pipe lies in the place of a block."""
    refusing.error = OSError(number, os.strerror(number))
    attempt(reopened)
    assert set(reopened.stats().misses) & {"damaged", "unavailable"} == {"damaged"}


def test_rejected_blocks_are_withheld_and_found_again_later(reopened, clock):
    restore = reopened.restore([reopened.match(ROOT, count(KNOWN)).spans])
    restore.reject("blocks of 2 layers do not fit 0")
    restore.close()
    assert attempt(reopened) == 0
    clock.now += 1.5
    assert attempt(reopened) == KNOWN


def test_unavailable_error_is_a_block_error():
    assert issubclass(UnavailableError, BlockError)


class Full(SystemCalls):
    """Refuses all writes while ``full`` is set."""

    full = False

    def write(self, fd: int, piece: memoryview) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, piece)


@pytest.mark.parametrize("why", ["full", "evicted"])
def test_blocks_missing_on_disk_are_written_again_by_a_longer_commit(tmp_path, clock, why):
    """A chain that begins in RAM alone is extended; the next process finds all of it."""
    drive = Full()
    settings = {"block_size": 4, "clock": clock, "filesystem": LocalFilesystem(drive), "free_space_floor": 0}
    with PrefixStore(tmp_path, **settings) as store:
        drive.full = why == "full"
        commit(store, count(KNOWN))
        store.flush()
        if why == "evicted":
            store._tiers.last.shrink(0)
        assert not files(store)
        drive.full = False
        clock.now += 100
        commit(store, count(2 * KNOWN))
        store.flush()
        assert restored_length(store, count(2 * KNOWN)) == 2 * KNOWN
    with PrefixStore(tmp_path, **settings) as store:
        assert restored_length(store, count(2 * KNOWN)) == 2 * KNOWN


def test_commit_without_new_tokens_writes_missing_blocks_again(tmp_path, clock):
    drive = Full()
    settings = {"block_size": 4, "clock": clock, "filesystem": LocalFilesystem(drive), "free_space_floor": 0}
    with PrefixStore(tmp_path, **settings) as store:
        drive.full = True
        commit(store, count(KNOWN))
        store.flush()
        drive.full = False
        clock.now += 100
        commit(store, count(KNOWN))
    with PrefixStore(tmp_path, **settings) as store:
        assert restored_length(store, count(KNOWN)) == KNOWN


def test_prompt_may_have_more_blocks_than_the_process_has_descriptors(tmp_path):
    """macOS allows 256; a long prompt has thousands of blocks."""
    resource = pytest.importorskip("resource")
    settings = {"block_size": 4, "host_budget": 1}
    with PrefixStore(tmp_path / "kv", **settings) as store:
        commit(store, count(600))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    with PrefixStore(tmp_path / "kv", **settings) as store:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 40, hard))
        try:
            assert restored_length(store, count(600)) == 600
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert store.stats().misses.get("unavailable", 0) == 0
        assert len(files(store)) == 150


def test_block_with_a_wrong_number_of_layers_is_the_only_one_removed(tmp_path):
    """A foreign file with the right key and right checksums."""
    settings = {"block_size": 4, "host_budget": 1}
    with PrefixStore(tmp_path / "kv", **settings) as store:
        commit(store, count(20))
    odd = chain(count(20), 4)[3]
    path = next(tmp_path.rglob(f"{odd.id.key}.safetensors"))
    path.write_bytes(b"".join(encode_block(Block(odd.id, odd.pages[:1], odd.depth_tokens))))
    with PrefixStore(tmp_path / "kv", **settings) as store:
        assert attempt(store, count(20)) == 12
        assert len(files(store)) == 4
        commit(store, count(20))
        store.flush()
        assert attempt(store, count(20)) == 20
