"""The descriptor cache keeps few files open, however many are read."""

import errno
import os
import threading

import pytest
import torch

from kvtier.errors import GoneError
from kvtier.kv.page import PageView
from kvtier.kv.spec import LayerSpec
from kvtier.offload.storage.page_file import PageFile
from kvtier.offload.storage.spill_folder import SpillFolder
from kvtier.platform.descriptors import OF_THIS_PROCESS, Descriptors, ReadFile


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / str(n) for n in range(20)]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


def read_file(path, descriptors):
    return ReadFile(lambda: os.open(path, os.O_RDONLY), descriptors)


def text(file):
    with file as fd:
        return os.pread(fd, 10, 0).decode()


def test_descriptor_cache_bounds_the_number_of_open_files(files):
    descriptors = Descriptors(4)
    read = [read_file(path, descriptors) for path in files]
    for _ in range(3):
        assert [text(file) for file in read] == [path.name for path in files]
        assert len(descriptors) == 4
    for file in read:
        file.close()
    assert len(descriptors) == 0


def test_descriptor_stays_open_while_there_is_room(files):
    opened = []
    file = ReadFile(lambda: opened.append(1) or os.open(files[0], os.O_RDONLY), Descriptors(1))
    assert text(file) == text(file) == "0"
    assert len(opened) == 1
    file.close()
    file.close()


def test_descriptor_in_use_is_not_closed(files):
    descriptors = Descriptors(0)
    file = read_file(files[0], descriptors)
    with file as fd:
        assert text(file) == "0"
        assert text(read_file(files[1], descriptors)) == "1"
        assert os.pread(fd, 1, 0) == b"0"
    assert len(descriptors) == 0


def test_file_that_replaced_the_original_is_not_read(files):
    file = read_file(files[0], Descriptors(0))
    assert text(file) == "0"
    files[1].replace(files[0])
    with pytest.raises(GoneError, match="another file"):
        text(file)


def test_held_file_can_be_read_after_it_is_deleted(files):
    file = read_file(files[0], Descriptors(0))
    file.hold()
    file.hold()
    files[0].unlink()
    assert text(file) == "0"
    file.close()
    with pytest.raises(GoneError, match="was there before"):
        text(file)
    with pytest.raises(FileNotFoundError):
        text(read_file(files[0], Descriptors(0)))


def test_running_out_of_descriptors_closes_idle_files(files):
    descriptors, room = Descriptors(10), [3]

    def open_if_room(path):
        if len(descriptors) >= room[0]:
            raise OSError(errno.EMFILE, "too many open files")
        return os.open(path, os.O_RDONLY)

    read = [ReadFile(lambda path=path: open_if_room(path), descriptors) for path in files[:6]]
    assert [text(file) for file in read] == [path.name for path in files[:6]]
    room[0] = 0
    with pytest.raises(OSError, match="too many"):
        text(read[0])
    assert len(descriptors) == 0


def test_number_of_open_files_depends_on_the_process_limit(files, monkeypatch):
    resource = pytest.importorskip("resource")
    descriptors = Descriptors()
    for allowed, most in ((4, 8), (64, 16), (resource.RLIM_INFINITY, 20)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, allowed=allowed: (allowed, allowed))
        read = [read_file(path, descriptors) for path in files]
        assert [text(file) for file in read] == [path.name for path in files]
        assert len(descriptors) == most
        for file in read:
            file.close()


def test_concurrent_opens_of_one_file_share_a_descriptor(files):
    descriptors, both, closed = Descriptors(10), threading.Barrier(2), []

    def open_together():
        both.wait()
        return os.open(files[0], os.O_RDONLY)

    file = ReadFile(open_together, descriptors)
    threads = [threading.Thread(target=lambda: closed.append(text(file))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert closed == ["0", "0"]
    assert len(descriptors) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_child_opens_its_own_descriptors(files):
    descriptors = Descriptors(10)
    file = read_file(files[0], descriptors)
    with file:
        child = os.fork()
        if child == 0:
            os._exit(0 if len(descriptors) == 0 and text(file) == "0" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert text(file) == "0"


def test_cold_layer_pages_move_although_idle_files_use_all_descriptors(tmp_path, monkeypatch):
    """Otherwise an answer would end midway, because its K and V are in these files alone."""
    idle = [tmp_path / str(n) for n in range(3)]
    for path in idle:
        path.touch()
        with read_file(path, OF_THIS_PROCESS):
            pass
    real = os.open

    def open_if_room(path, *arguments):
        if len(OF_THIS_PROCESS) >= 3:
            raise OSError(errno.EMFILE, "too many open files")
        return real(path, *arguments)

    spec = LayerSpec(2, 4, 2, 4, torch.float32)
    pages = PageFile(SpillFolder(tmp_path / "spilled"), 1, 3, spec)
    k_bhtd, v_bhtd = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    k_htd, v_htd = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", open_if_room)
        pages.write(0, k_bhtd, v_bhtd)
        assert len(OF_THIS_PROCESS) < 3
        pages.read(0, 0, 3, PageView.on(k_htd, v_htd))
    assert torch.equal(k_htd, k_bhtd[0])
    assert torch.equal(v_htd, v_bhtd[0])
