"""Leases between processes, held as locks on bytes of one file."""

import gc
import os
from pathlib import Path

import pytest

from kvtier.store.tiers.disk.file_leases import FileLeases

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="no locks of open files")
KEY, OTHER = "ab" * 32, "cd" * 32


def descriptors_open():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "leases.lock"


@pytest.fixture
def one(path):
    leases = FileLeases(path)
    yield leases
    leases.close()


@pytest.fixture
def two(path):
    leases = FileLeases(path)
    yield leases
    leases.close()


def test_shared_key_cannot_be_claimed(one, two):
    assert one.share(KEY)
    assert two.share(KEY)
    assert not one.claim(KEY)
    assert two.claim(OTHER)
    two.release(KEY)
    assert not one.claim(KEY)
    assert not two.claim(KEY)
    one.release(KEY)
    assert two.claim(KEY)


def test_claimed_key_cannot_be_shared_or_claimed(one, two):
    assert one.claim(KEY)
    for leases in (one, two):
        assert not leases.share(KEY)
        assert not leases.claim(KEY)
        assert leases.share(OTHER)
    one.unclaim(KEY)
    assert two.share(KEY)


def test_key_shared_twice_must_be_released_twice(one, two):
    assert one.share(KEY)
    assert one.share(KEY)
    one.release(KEY)
    assert not two.claim(KEY)
    one.release(KEY)
    assert two.claim(KEY)


def test_close_keeps_a_lease_until_it_is_released(one, two):
    assert one.share(KEY)
    one.close()
    assert not two.claim(KEY)
    one.release(KEY)
    assert two.claim(KEY)


def test_many_leases_open_no_more_file_descriptors(one):
    before = descriptors_open()
    for n in range(1000):
        assert one.share(f"{n:064x}"[::-1])
    assert descriptors_open() == before


def test_leases_hold_after_the_lease_file_is_deleted(one, two, path):
    assert one.share(KEY)
    path.unlink()
    assert one.share(OTHER)
    assert not two.claim(OTHER)
    assert not two.claim(KEY)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere")])
def test_leases_are_granted_where_no_lease_file_can_be_made(path, make):
    make(path)
    leases = FileLeases(path)
    assert leases.share(KEY)
    leases.release(KEY)
    assert leases.claim(KEY)
    leases.unclaim(KEY)
    leases.close()
    assert not path.with_name("elsewhere").exists()


def test_lease_is_granted_when_its_folder_is_missing(tmp_path):
    leases = FileLeases(tmp_path / "none" / "leases.lock")
    assert leases.share(KEY)
    leases.close()


def test_forked_child_keeps_its_leases_until_it_exits(one, two):
    assert one.share(KEY)
    (ready, tell), (wait, end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        os.write(tell, b".")
        os.read(wait, 1)  # until the other end is closed
        os._exit(0)
    os.read(ready, 1)
    one.release(KEY)
    assert not two.claim(KEY)
    os.close(end)
    os.waitpid(child, 0)
    assert two.claim(KEY)
    for fd in (ready, tell, wait):
        os.close(fd)


def test_process_exit_releases_its_leases(one, path):
    child = os.fork()
    if child == 0:
        FileLeases(path).share(KEY)
        os._exit(0)
    os.waitpid(child, 0)
    gc.collect()
    assert one.claim(KEY)
