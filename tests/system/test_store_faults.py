"""Promise 4: whatever happens to the folder of a store, generate() answers, and a warning says what was lost."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvtier import PrefixStore, TieredCache
from tests.support.stores import DAMAGES, block_files, bytes_on_disk, damage, leftovers
from tests.support.upstream import CACHE

COLD = {"block_size": 8, "host_budget": 1}  # no block fits into RAM: all that is reused is read from files
WARM = {"block_size": 8}


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch):
    """Nobody pulls a plug here: waiting for the drive would only cost time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def ask(make_model, generate, tokens):
    """``ask(cache, ids)``: a turn whose tokens are those of a fresh ``DynamicCache``; returns the next prompt."""
    model, more = make_model("llama"), iter(range(1, 1000))

    def turn(cache, ids=None, **settings):
        ids = tokens(30) if ids is None else ids
        found = generate(model, ids, cache, **settings).sequences
        assert torch.equal(found, generate(model, ids, **settings).sequences)
        return torch.cat([found, tokens(5, seed=next(more))], 1)

    turn.model = model
    return turn


def works_again(folder: Path, ask, ids, settings) -> None:
    """A healthy disk: what is said now is known to the next store."""
    with PrefixStore(folder, **settings) as store, TieredCache(store) as cache:
        ids = ask(cache, ids)
    with PrefixStore(folder, **settings) as store, TieredCache(store) as cache:
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] == ids.shape[1] - 6
    assert leftovers(folder) == []


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.sample(4)  # of 16
@pytest.mark.parametrize("settings", [COLD, WARM], ids=["cold", "warm"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=os.strerror)
@pytest.mark.parametrize("name", ["fsync", "open", "replace", "mkdir"])
def test_a_disk_that_refuses_to_be_written_to(tmp_path, monkeypatch, ask, warned, settings, error, name):
    original = getattr(os, name)

    def refuse(path, *args, **kwargs):
        if name != "open" or (args and args[0] & os.O_CREAT):
            raise OSError(error, os.strerror(error), str(path))
        return original(path, *args, **kwargs)

    with PrefixStore(tmp_path, **settings) as store, TieredCache(store) as cache:
        with monkeypatch.context() as patched:
            patched.setattr(os, name, refuse)
            ids = ask(cache)
            for _ in range(2):
                ids = ask(cache, ids)
                assert cache.last_turn.cached_by_tier["device"] == cache.last_turn.prompt_tokens - 6
            cache.reset()
            ask(cache, ids)
            store.flush()
            assert block_files(tmp_path) == []
            assert leftovers(tmp_path) == []
        found = warned()
        assert len(found) == 1
        assert os.strerror(error) in found[0]
        assert "not kept on disk" in found[0]
        assert str(tmp_path) in found[0]
    works_again(tmp_path, ask, ids, settings)


def test_a_disk_that_fills_up_in_the_middle_of_a_conversation(tmp_path, monkeypatch, ask, warned):
    """What was written before stays good, but for what had to make room; what came after is recomputed."""
    now = [0.0]
    with PrefixStore(tmp_path, **COLD, clock=lambda: now[0]) as store, TieredCache(store) as cache:
        ids = ask(cache)
        with monkeypatch.context() as patched:

            def full(fd):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patched.setattr(os, "fsync", full)
            ids = ask(cache, ids)
            cache.reset()
            ask(cache, ids)
            assert 16 <= cache.last_turn.cached_by_tier["disk"] < 37
            assert store.stats().paused
        assert len(warned()) == 1
        now[0] += 120
        cache.reset()
        ask(cache, ids)  # there is room again, and the last turn held all of it
        assert store.stats().paused is None
        cache.reset()
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] == ids.shape[1] - 1
    assert warned() == []


@pytest.fixture(params=[416])
def mounted(tmp_path, request) -> Iterator[Path]:
    """A file system of its own, so many KiB large. Needs root."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("only root may mount")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", folder], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_file_system_that_is_really_full(mounted, ask, warned):
    """Files, their folders and the catalog all meet the end of the space."""
    with PrefixStore(mounted, **COLD, free_space_floor=0) as store, TieredCache(store) as cache:
        ids = ask(cache)
        for _ in range(12):
            ids = ask(cache, ids)
        for _ in range(2):
            cache.reset()
            ask(cache, ids)
        known = cache.last_turn.cached_by_tier["disk"]
        assert 0 < known < ids.shape[1] - 1
    assert 1 <= len(warned()) <= 3  # of writing, of deleting, and of the catalog
    with PrefixStore(mounted, **COLD, free_space_floor=0) as store, TieredCache(store) as cache:
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] > 0


@pytest.mark.parametrize("mounted", [2048], indirect=True)
def test_a_file_system_that_becomes_read_only(mounted, ask, warned):
    settings = {**COLD, "free_space_floor": 0}
    with PrefixStore(mounted, **settings) as store, TieredCache(store) as cache:
        ids = ask(cache)
        store.flush()
        # SQLite holds files open for writing, which a remount would refuse: a second, read-only view lies on top.
        subprocess.run(["mount", "--bind", mounted, mounted], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", mounted], check=True)
            ids = ask(cache, ids)
            cache.reset()
            ids = ask(cache, ids)
            assert cache.last_turn.cached_by_tier["disk"] == 37
            store.flush()
        finally:
            subprocess.run(["umount", "-l", mounted], check=True)
        assert len(warned()) == 1
        cache.reset()
        ask(cache, ids)
    works_again(mounted, ask, ids, settings)


def test_a_folder_that_becomes_read_only(tmp_path, ask, warned):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    with PrefixStore(tmp_path, **COLD) as store, TieredCache(store) as cache:
        ids = ask(cache)
        store.flush()
        folders = [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o500)
        try:
            ids = ask(cache, ids)
            cache.reset()
            ids = ask(cache, ids)
            assert cache.last_turn.cached_by_tier["disk"] == 37
            store.flush()
        finally:
            for folder in folders:
                folder.chmod(0o700)
        assert len(warned()) == 1
    works_again(tmp_path, ask, ids, COLD)


@pytest.mark.parametrize("settings", [COLD, WARM], ids=["cold", "warm"])
def test_a_folder_that_is_deleted(tmp_path, ask, warned, settings):
    folder = tmp_path / "store"
    with PrefixStore(folder, **settings) as store, TieredCache(store) as cache:
        ids = ask(cache)
        store.flush()
        shutil.rmtree(folder)
        for _ in range(3):
            ids = ask(cache, ids)
        cache.reset()
        ids = ask(cache, ids)
        store.flush()
    assert len(warned()) <= 3  # of the blocks that are gone, of the catalog, of what cannot be written
    works_again(folder, ask, ids, settings)


def test_a_folder_that_becomes_a_file(tmp_path, ask, warned):
    with PrefixStore(tmp_path, **COLD) as store, TieredCache(store) as cache:
        ids = ask(cache)
        store.flush()
        shutil.rmtree(tmp_path / "blocks")
        (tmp_path / "blocks").write_text("a file")
        for _ in range(2):
            cache.reset()
            ids = ask(cache, ids)
        store.flush()
        assert len(warned()) <= 3  # a block is gone, it cannot be deleted, and nothing can be written
        (tmp_path / "blocks").unlink()
    works_again(tmp_path, ask, ids, COLD)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.sample(6)  # of 24
@pytest.mark.parametrize("compression", ["raw", "zstd"])
@pytest.mark.parametrize("which", [0, 2, -1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_block_damaged_between_turns(tmp_path, ask, warned, how, which, compression):
    with PrefixStore(tmp_path, **COLD, compression=compression) as store, TieredCache(store) as cache:
        ids = ask(cache)
        store.flush()
        chain = sorted(block_files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
        assert len(chain) == 5
        damage(chain[which], how, at=-20)
        cache.reset()
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] == {0: 0, 2: 16, -1: 32}[which]
        found = warned()
        assert len(found) == 1
        assert chain[which].name in found[0]
        assert "recomputed" in found[0]
        cache.reset()
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] == ids.shape[1] - 1
    assert warned() == []


@pytest.mark.sample(5)  # of 8
@pytest.mark.parametrize("which", [0, 2], ids=["first", "middle"])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_block_damaged_while_the_store_is_closed(tmp_path, ask, warned, how, which):
    with PrefixStore(tmp_path, **WARM) as store, TieredCache(store) as cache:
        ids = ask(cache)
    damage(sorted(block_files(tmp_path), key=lambda path: path.stat().st_mtime_ns)[which], how, at=-20)
    with PrefixStore(tmp_path, **WARM) as store, TieredCache(store) as cache:
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] == {0: 0, 2: 16}[which]
    assert len(warned()) == 1
    works_again(tmp_path, ask, ids, WARM)


def flipped(read, buffers):
    part = next(memoryview(b).cast("B") for b in buffers if memoryview(b).nbytes)
    part[0] ^= 1
    return read


def failing(read, buffers):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def ended(read, buffers):
    return 0


@pytest.mark.sample(1)  # of 15
@pytest.mark.parametrize(
    ("use", "compression"),
    [("generate", "raw"), ("generate", "zstd"), ("begin", "raw"), ("beams", "zstd"), ("batch", "raw")],
)
@pytest.mark.parametrize("fault", [flipped, failing, ended], ids=lambda fault: fault.__name__)
def test_a_drive_that_fails_while_a_turn_reads(tmp_path, monkeypatch, generate, ask, warned, use, compression, fault):
    """Each read in turn is the one that fails: of a header, of ids, of the first layer, of the last one."""
    preadv, model = os.preadv, ask.model
    settings = {**COLD, "compression": compression}
    with PrefixStore(tmp_path, **settings) as store, TieredCache(store) as cache:
        ids = ask(cache)
        ask(cache, ids)
    ids = ids.repeat(2, 1) if use == "batch" else ids
    mode = {"num_beams": 2} if use == "beams" else {}
    expected, failed_at = generate(model, ids, **mode).sequences, 0
    while True:
        reads = itertools.count()  # by several threads

        def read(fd, buffers, offset, reads=reads, failing_read=failed_at):
            count = preadv(fd, buffers, offset)
            return fault(count, buffers) if next(reads) == failing_read else count

        with PrefixStore(tmp_path, **settings) as store, TieredCache(store) as cache:
            with monkeypatch.context() as patched:
                patched.setattr(os, "preadv", read)
                if use == "begin":
                    cached = cache.begin(model, ids).cached_tokens
                    with torch.no_grad():
                        logits = model(ids[:, cached:], **{CACHE: cache}).logits[:, -1]
                    assert torch.allclose(logits, model(ids).logits[:, -1], atol=1e-4)
                    cache.commit(ids)
                else:
                    assert torch.equal(generate(model, ids, cache, **mode).sequences, expected)
            finished = next(reads) <= failed_at
            # A read that ends early is tried again: that may be all it needs.
            assert len(warned()) == (not finished) or fault is ended
            assert not finished or cache.last_turn.cached_tokens == (ids.shape[1] - 1) * len(ids)
            if finished:
                break
            # Each beam that was kept has a block of its own that begins with the end of the prompt.
            assert cache.last_turn.cached_tokens < (ids.shape[1] - 1) * len(ids) or fault is ended or use == "beams"
            cache.reset()
            ask(cache, ids[:1])  # what was lost is there again
        failed_at += 7 if use != "generate" else 3 if compression == "zstd" else 1
    assert failed_at > 20


@pytest.mark.sample(3)  # of 4
@pytest.mark.parametrize("how", DAMAGES)
def test_a_block_damaged_between_begin_and_the_first_forward_pass(tmp_path, ask, warned, how):
    """Its pages may have landed or not: either way nothing wrong is attended to."""
    with PrefixStore(tmp_path, **COLD) as store, TieredCache(store) as cache:
        ids = ask(cache)
        store.flush()
        cache.reset()
        files = iter(block_files(tmp_path))
        hook = ask.model.register_forward_pre_hook(lambda *_: damage(next(files), how, at=-20))
        found = ask.model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False, suppress_tokens=[0])
        hook.remove()
        assert torch.equal(found, ask.model.generate(ids, max_new_tokens=3, do_sample=False, suppress_tokens=[0]))
        for _ in range(2):
            cache.reset()
            ids = ask(cache, ids)
    assert len(warned()) <= 3  # a damaged block each
    works_again(tmp_path, ask, ids, COLD)


# --- the catalog ------------------------------------------------------------------------------------------------------


@pytest.mark.sample(3)  # of 18
@pytest.mark.parametrize("settings", [COLD, WARM], ids=["cold", "warm"])
@pytest.mark.parametrize("files", [("",), ("-wal",), ("", "-wal", "-shm")], ids=lambda names: "+".join(names) or "main")
@pytest.mark.parametrize("how", ["delete", "empty", "garbage"])
def test_a_catalog_lost_under_a_running_store(tmp_path, ask, warned, settings, files, how):
    with PrefixStore(tmp_path, **settings) as store, TieredCache(store) as cache:
        ids = ask(cache)
        store.flush()
        for suffix in files:
            path = Path(f"{tmp_path / 'catalog.sqlite'}{suffix}")
            if how == "delete":
                path.unlink()
            elif how == "empty":
                if suffix != "-shm":  # SQLite has it mapped: to shorten it ends the process, whatever one does
                    os.truncate(path, 0)
            else:
                path.write_bytes(b"\xa5" * path.stat().st_size)
        for _ in range(3):
            ids = ask(cache, ids)
            cache.reset()
        store.flush()
        with contextlib.closing(TieredCache(store)) as other:
            ask(other, ids)
    assert len(warned()) <= 3  # of the catalog; of what cannot be written; of it being made anew
    with PrefixStore(tmp_path, **settings) as store, TieredCache(store) as cache:
        ask(cache, ids)
    works_again(tmp_path, ask, ids, settings)
    with PrefixStore(tmp_path, **settings) as store:
        assert bytes_on_disk(tmp_path) == store.stats().tiers[1].nbytes
        assert store.verify().ok


def test_a_catalog_that_knows_blocks_that_are_gone(tmp_path, ask, warned):
    """One turn finds all of them out, and puts them back."""
    with PrefixStore(tmp_path, **COLD) as store, TieredCache(store) as cache:
        ids = ask(cache)
        ask(cache, ids)
        store.flush()
        for path in block_files(tmp_path):
            path.unlink()
        cache.reset()
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] == 0
        cache.reset()
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] == ids.shape[1] - 1
    assert len(warned()) == 1


@pytest.mark.parametrize("compression", ["raw", "zstd"])
def test_blocks_whose_pages_are_damaged_between_turns(tmp_path, ask, warned, compression):
    """They can be opened. One turn finds all of them out all the same, and puts them back."""
    with PrefixStore(tmp_path, **COLD, compression=compression) as store, TieredCache(store) as cache:
        ids = ask(cache)
        ask(cache, ids)
        store.flush()
        chain = sorted(block_files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
        for path, end in zip(chain[1:], itertools.cycle([True, False]), strict=False):
            size = path.stat().st_size
            damage(path, "flip", at=-20 if end else size // 2)  # of the last layer, and of one before it
        cache.reset()
        ask(cache, ids)
        assert 0 <= cache.last_turn.cached_by_tier["disk"] <= 8
        cache.reset()
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] == ids.shape[1] - 1
    assert len(warned()) == 1


def test_a_catalog_with_any_byte_of_its_header_flipped(tmp_path, ask, warned):
    """The files say all that it said: it is read as it is, or made anew."""
    with PrefixStore(tmp_path / "whole", **COLD) as store, TieredCache(store) as cache:
        ids = ask(cache)
    for at in range(100):
        shutil.copytree(tmp_path / "whole", tmp_path / "flipped")
        damage(tmp_path / "flipped" / "catalog.sqlite", "flip", at)
        with PrefixStore(tmp_path / "flipped", **COLD) as store, TieredCache(store) as cache:
            cache.begin(ask.model, ids)
            assert cache.last_turn.cached_by_tier["disk"] == ids.shape[1] - 6, f"byte {at}"
        assert len(warned()) <= 1
        shutil.rmtree(tmp_path / "flipped")
