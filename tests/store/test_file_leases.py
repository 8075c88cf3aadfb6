"""Leases between processes: locks on bytes of one file."""

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


def test_what_is_read_cannot_be_claimed(one, two):
    assert one.share(KEY)
    assert two.share(KEY)
    assert not one.claim(KEY)
    assert two.claim(OTHER)
    two.release(KEY)
    assert not one.claim(KEY)
    assert not two.claim(KEY)
    one.release(KEY)
    assert two.claim(KEY)


def test_what_is_claimed_cannot_be_read_or_claimed(one, two):
    assert one.claim(KEY)
    for leases in (one, two):
        assert not leases.share(KEY)
        assert not leases.claim(KEY)
        assert leases.share(OTHER)
    one.unclaim(KEY)
    assert two.share(KEY)


def test_each_lease_counts(one, two):
    assert one.share(KEY)
    assert one.share(KEY)
    one.release(KEY)
    assert not two.claim(KEY)
    one.release(KEY)
    assert two.claim(KEY)


def test_closing_waits_for_those_who_read(one, two):
    assert one.share(KEY)
    one.close()
    assert not two.claim(KEY)
    one.release(KEY)
    assert two.claim(KEY)


def test_one_descriptor_does_for_all(one):
    before = descriptors_open()
    for n in range(1000):
        assert one.share(f"{n:064x}"[::-1])
    assert descriptors_open() == before


def test_a_file_that_was_tidied_up_is_made_again(one, two, path):
    assert one.share(KEY)
    path.unlink()
    assert one.share(OTHER)
    assert not two.claim(OTHER)
    assert not two.claim(KEY)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere")])
def test_where_no_file_can_be_nothing_is_refused(path, make):
    make(path)
    leases = FileLeases(path)
    assert leases.share(KEY)
    leases.release(KEY)
    assert leases.claim(KEY)
    leases.unclaim(KEY)
    leases.close()
    assert not path.with_name("elsewhere").exists()


def test_without_a_folder_nothing_is_refused(tmp_path):
    leases = FileLeases(tmp_path / "none" / "leases.lock")
    assert leases.share(KEY)
    leases.close()


def test_a_child_has_leases_of_its_own(one, two):
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


def test_a_process_that_ends_leaves_none(one, path):
    child = os.fork()
    if child == 0:
        FileLeases(path).share(KEY)
        os._exit(0)
    os.waitpid(child, 0)
    gc.collect()
    assert one.claim(KEY)
