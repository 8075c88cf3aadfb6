"""Page files and their spill folder: private, complete, and deleted when no longer needed."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvtier.errors import StreamError
from kvtier.kv.page import PageView
from kvtier.kv.spec import LayerSpec
from kvtier.offload.storage import spill_folder
from kvtier.offload.storage.page_file import PageFile
from kvtier.offload.storage.spill_folder import SpillFolder

ROWS, TOKENS = 2, 6
pytestmark = pytest.mark.usefixtures("on_host")


@pytest.fixture
def folder(tmp_path):
    folder = SpillFolder(tmp_path / "spill")
    yield folder
    folder.close()


def filled(folder, dtype=torch.float32, pieces=((0, 6),)):
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(ROWS, 2, TOKENS, 4, generator=generator).to(dtype)
    v = torch.randn(ROWS, 3, TOKENS, 5, generator=generator).to(dtype)
    file = PageFile(folder, ROWS, TOKENS, LayerSpec.of(k, v))
    for first, last in pieces:
        file.write(first, k[:, :, first:last], v[:, :, first:last])
    return file, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pieces", [((0, 6),), ((0, 2), (2, 6)), ((4, 6), (0, 4))], ids=["whole", "pieces", "backward"])
def test_page_file_is_a_valid_safetensors_file(folder, dtype, pieces):
    file, k, v = filled(folder, dtype, pieces)
    found = load_file(file.path)
    assert torch.equal(found["k"], k)
    assert torch.equal(found["v"], v)


@pytest.mark.parametrize(("first", "last"), [(0, 6), (2, 5), (5, 6)])
@pytest.mark.parametrize("row", range(ROWS))
def test_page_file_reads_any_part_of_a_row(folder, row, first, last):
    file, k, v = filled(folder)
    room = torch.zeros(2, 20, 4), torch.zeros(3, 20, 5)  # heads are not contiguous, as in a buffer
    file.read(row, first, last, PageView.on(room[0][:, 7 : 7 + last - first], room[1][:, 7 : 7 + last - first]))
    assert torch.equal(room[0][:, 7 : 7 + last - first], k[row, :, first:last])
    assert torch.equal(room[1][:, 7 : 7 + last - first], v[row, :, first:last])
    assert not room[0][:, :7].any()
    assert not room[0][:, 7 + last - first :].any()


def test_page_file_handles_short_reads_and_writes(folder, monkeypatch):
    def little(call):
        return lambda fd, pieces, offset: call(fd, [pieces[0][:5]], offset)

    monkeypatch.setattr(os, "pwritev", little(os.pwritev))
    file, k, v = filled(folder)
    assert torch.equal(load_file(file.path)["k"], k)
    monkeypatch.setattr(os, "preadv", little(os.preadv))
    found = torch.zeros(2, 6, 4), torch.zeros(3, 6, 5)
    file.read(1, 0, 6, PageView.on(*found))
    assert torch.equal(found[1], v[1])


def test_page_files_and_their_folder_are_private_to_the_user(folder):
    before = os.umask(0)
    try:
        file, *_ = filled(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path(file.path).stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(file.path).parent.stat().st_mode) == 0o700


def test_page_file_is_deleted_with_its_last_reader_and_the_folder_with_its_last_user(folder, tmp_path):
    file, *_ = filled(folder)
    path = file.path
    other = folder.share()
    del file
    gc.collect()
    assert not Path(path).exists()
    kept, *_ = filled(folder)
    folder.close()
    assert Path(kept.path).exists(), "another cache reads it"
    other.close()
    assert list((tmp_path / "spill").iterdir()) == []


def test_spill_folder_is_not_created_before_first_use(tmp_path):
    SpillFolder(tmp_path / "spill").close()
    assert not (tmp_path / "spill").exists()


@pytest.mark.parametrize("damage", ["cut", "longer", "delete"])
def test_resized_or_deleted_page_file_raises_stream_error(folder, damage):
    file, *_ = filled(folder)
    if damage == "delete":
        Path(file.path).unlink()
    else:
        os.truncate(file.path, Path(file.path).stat().st_size + (1 if damage == "longer" else -1))
    with pytest.raises(StreamError, match=r"lost"):
        file.read(0, 0, 6, PageView.on(torch.zeros(2, 6, 4), torch.zeros(3, 6, 5)))


def test_dtype_without_a_safetensors_name_raises_stream_error(folder):
    with pytest.raises(StreamError, match="complex64"):
        PageFile(folder, 1, 1, LayerSpec(1, 1, 1, 1, torch.complex64))


def hold(parent, ready, end):
    folder = SpillFolder(parent)
    file, *_ = filled(folder)
    ready.send(file.path)
    end.recv()


def other_process(parent, method):
    context = multiprocessing.get_context(method)
    (ours, theirs), (end, theirs_end) = context.Pipe(), context.Pipe()
    process = context.Process(target=hold, args=(parent, theirs, theirs_end))
    process.start()
    return process, ours.recv(), end


@pytest.mark.sample(2, of="new processes")
def test_sweep_removes_the_folder_of_a_killed_process_and_keeps_live_ones(folder, tmp_path):
    killed, left, _ = other_process(tmp_path / "spill", "spawn")
    living, kept, end = other_process(tmp_path / "spill", "spawn")
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert Path(left).exists()
    SpillFolder(tmp_path / "spill").close()  # the next process that starts
    assert not Path(left).parent.exists()
    assert Path(kept).exists()
    end.send(None)
    living.join()
    assert not Path(kept).parent.exists(), "a process that ends takes its folder along"


def test_forked_child_does_not_delete_the_files_of_its_parent(folder):
    file, k, _ = filled(folder)
    pid = os.fork()
    if pid == 0:
        file.read(0, 0, 6, PageView.on(torch.zeros(2, 6, 4), torch.zeros(3, 6, 5)))
        del file
        folder.close()
        gc.collect()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert torch.equal(load_file(file.path)["k"], k)


def named(parent, pid=1):
    """An empty folder with the name of a spill folder."""
    path = parent / f"{pid}-{'0' * 32}"
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("moment", ["mkdir", "lock"])
def test_folder_swept_during_its_creation_is_created_again(tmp_path, monkeypatch, moment):
    """Another process sweeps it before the lock file exists, or before the lock is held."""
    parent, swept = tmp_path / "spill", []
    opened, locked = os.open, spill_folder.fcntl.flock

    def sweep_once():
        if not swept:
            swept.append(True)
            spill_folder._sweep(parent)

    def open_late(path, *args, **kwargs):
        if Path(path).name == "owner.lock" and moment == "mkdir":
            sweep_once()
        return opened(path, *args, **kwargs)

    def lock_late(fd, how):
        if moment == "lock":
            sweep_once()
        locked(fd, how)

    folder = SpillFolder(parent)
    monkeypatch.setattr(spill_folder.os, "open", open_late)
    monkeypatch.setattr(spill_folder.fcntl, "flock", lock_late)
    file, k, _ = filled(folder)
    assert swept
    assert torch.equal(load_file(file.path)["k"], k)
    spill_folder._sweep(parent)
    assert Path(file.path).exists(), "its owner lives"
    folder.close()


def test_deleted_spill_folder_is_created_again(folder):
    filled(folder)
    shutil.rmtree(folder.parent)
    file, k, _ = filled(folder)
    assert torch.equal(load_file(file.path)["k"], k)
    spill_folder._sweep(folder.parent)
    assert Path(file.path).exists()


def test_folder_without_a_lock_is_removed_at_once_or_swept_later(tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    folder = SpillFolder(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(spill_folder.os, "open", full)
        with pytest.raises(StreamError, match="No space left"):
            folder.new_file()
    assert not list(tmp_path.iterdir())
    killed = named(tmp_path)  # as if killed between the creation of the folder and of its lock
    SpillFolder(tmp_path).close()
    assert not killed.exists()


def test_sweep_leaves_foreign_files_and_folders(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "owner.lock").touch()
    full = named(tmp_path)
    (full / "letter.txt").touch()
    pipe = named(tmp_path, 2)
    os.mkfifo(pipe / "owner.lock")
    SpillFolder(tmp_path).close()
    assert (tmp_path / "thesis" / "owner.lock").exists()
    assert (full / "letter.txt").exists()
