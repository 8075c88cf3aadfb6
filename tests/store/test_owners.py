"""Owners: the processes that use a store folder, and detection of ended ones."""

import fcntl
import multiprocessing
import os
import signal
import sys

import pytest

from kvtier.store.tiers.disk.owners import Owner, pid_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks that the system lets go of")


def test_owner_is_alive_until_it_is_closed(tmp_path):
    owner, other = Owner(tmp_path), Owner(tmp_path)
    assert other.lives(owner.name)
    assert other.others() == [owner.name]
    assert pid_of(owner.name) == os.getpid()
    owner.close()
    owner.close()
    assert not other.lives(owner.name)
    assert other.others() == []
    other.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "1-2", "12-" + "z" * 16])
def test_invalid_owner_name_counts_as_dead(tmp_path, name):
    owner = Owner(tmp_path)
    assert not owner.lives(name)
    assert pid_of(name) == 0
    owner.close()


def test_owner_whose_file_is_deleted_before_it_is_locked_takes_another_name(tmp_path, monkeypatch):
    """Before the new file is locked, another store takes it for the file of a dead owner."""
    flock, buried = fcntl.flock, []

    def slow(fd, how):
        if not buried:
            buried.extend(tmp_path.iterdir())
            buried[0].unlink()
        return flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    owner, other = Owner(tmp_path), Owner(tmp_path)
    assert buried[0].stem != owner.name
    assert other.lives(owner.name)
    owner.close()
    other.close()


def _live_and_wait(folder, names):
    names.put(Owner(folder).name)
    signal.pause()


def test_owner_of_a_killed_process_is_dead(tmp_path):
    context = multiprocessing.get_context("fork")
    names = context.SimpleQueue()
    process = context.Process(target=_live_and_wait, args=(tmp_path, names))
    process.start()
    name, owner = names.get(), Owner(tmp_path)
    assert process.is_alive()
    assert owner.lives(name)
    process.kill()
    process.join()
    assert not owner.lives(name)
    assert owner.others() == [name]
    owner.bury(name)
    assert owner.others() == []
    owner.close()


def test_forked_child_becomes_a_separate_owner(tmp_path):
    owner = Owner(tmp_path)
    name = owner.name
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ok = owner.name != name and owner.lives(name) and owner.lives(owner.name)
            os.write(write, b"y" if ok else b"n")
            owner.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"y"
    assert owner.lives(name)
    other = Owner(tmp_path)
    assert other.lives(name), "the child's end is not the parent's"
    os.close(read)
    os.close(write)
    other.close()
    owner.close()
