"""Promise 4: generate() answers despite any fault in the folder of a store, and a warning says what was lost."""

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
from tests.support.reuse import reuse_off
from tests.support.stores import DAMAGES, block_files, bytes_on_disk, damage, leftovers
from tests.support.upstream import CACHE

COLD = {"block_size": 8, "host_budget": 1}  # no block fits into RAM: every cache hit comes from files
WARM = {"block_size": 8}


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch):
    """No power fails in these tests: waiting for the drive would only cost time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def ask(make_model, generate, tokens):
    """``ask(cache, ids)`` checks a turn's tokens against a fresh ``DynamicCache``, and returns the next prompt."""
    model, more = make_model("llama"), iter(range(1, 1000))

    def turn(cache, ids=None, **settings):
        ids = tokens(30) if ids is None else ids
        found = generate(model, ids, cache, **settings).sequences
        assert torch.equal(found, generate(model, ids, **settings).sequences)
        return torch.cat([found, tokens(5, seed=next(more))], 1)

    turn.model = model
    return turn


def works_again(folder: Path, ask, ids, settings) -> None:
    """On a healthy disk, the next store restores the tokens of this turn."""
    with PrefixStore(folder, **settings) as store, TieredCache(store) as cache:
        ids = ask(cache, ids)
    with PrefixStore(folder, **settings) as store, TieredCache(store) as cache:
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] == ids.shape[1] - 6
    assert leftovers(folder) == []


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)  # of 16
@pytest.mark.parametrize("settings", [COLD, WARM], ids=["cold", "warm"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=os.strerror)
@pytest.mark.parametrize("name", ["fsync", "open", "replace", "mkdir"])
def test_disk_write_errors_warn_once_and_generation_stays_exact(
    tmp_path, monkeypatch, ask, warned, settings, error, name
):
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


def test_disk_that_fills_up_keeps_earlier_blocks_and_recovers(tmp_path, monkeypatch, ask, warned):
    """Blocks written earlier stay valid, except for evicted blocks; later tokens are recomputed."""
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
        ask(cache, ids)  # space is free again, and the last turn held all tokens
        assert store.stats().paused is None
        cache.reset()
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] == ids.shape[1] - 1
    assert warned() == []


@pytest.fixture(params=[416])
def mounted(tmp_path, request) -> Iterator[Path]:
    """A separate file system of ``request.param`` KiB. Needs root."""
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


def test_full_file_system_keeps_a_part_and_generation_stays_exact(mounted, ask, warned):
    """Files, their folders and the catalog all run out of space."""
    with PrefixStore(mounted, **COLD, free_space_floor=0) as store, TieredCache(store) as cache:
        ids = ask(cache)
        for _ in range(12):
            ids = ask(cache, ids)
        for _ in range(2):
            cache.reset()
            ask(cache, ids)
        known = cache.last_turn.cached_by_tier["disk"]
        assert 0 < known < ids.shape[1] - 1
    assert 1 <= len(warned()) <= 3  # for writing, for deleting, and for the catalog
    with PrefixStore(mounted, **COLD, free_space_floor=0) as store, TieredCache(store) as cache:
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] > 0


@pytest.mark.parametrize("mounted", [2048], indirect=True)
def test_file_system_that_turns_read_only_is_still_read_and_works_later(mounted, ask, warned):
    settings = {**COLD, "free_space_floor": 0}
    with PrefixStore(mounted, **settings) as store, TieredCache(store) as cache:
        ids = ask(cache)
        store.flush()
        # SQLite holds files open for writing, so a remount would be refused. A second, read-only view is mounted on
        # top.
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


def test_folder_that_turns_read_only_is_still_read_and_works_later(tmp_path, ask, warned):
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
def test_deleted_store_folder_keeps_generation_exact_and_works_later(tmp_path, ask, warned, settings):
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
    assert len(warned()) <= 3  # for lost blocks, for the catalog, for failed writes
    works_again(folder, ask, ids, settings)


def test_blocks_folder_replaced_by_a_file_keeps_generation_exact(tmp_path, ask, warned):
    with PrefixStore(tmp_path, **COLD) as store, TieredCache(store) as cache:
        ids = ask(cache)
        store.flush()
        shutil.rmtree(tmp_path / "blocks")
        (tmp_path / "blocks").write_text("a file")
        for _ in range(2):
            cache.reset()
            ids = ask(cache, ids)
        store.flush()
        assert len(warned()) <= 3  # a block is lost, its deletion fails, and writes fail
        (tmp_path / "blocks").unlink()
    works_again(tmp_path, ask, ids, COLD)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.sample(3)  # of 24
@pytest.mark.parametrize("compression", ["raw", "zstd"])
@pytest.mark.parametrize("which", [0, 2, -1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("how", DAMAGES)
def test_block_damaged_between_turns_is_reported_and_recomputed(tmp_path, ask, warned, how, which, compression):
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


@pytest.mark.sample(2)  # of 8
@pytest.mark.parametrize("which", [0, 2], ids=["first", "middle"])
@pytest.mark.parametrize("how", DAMAGES)
def test_block_damaged_while_the_store_is_closed_is_reported_and_recomputed(tmp_path, ask, warned, how, which):
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
def test_failing_read_during_a_turn_keeps_generation_exact(
    tmp_path, monkeypatch, generate, ask, warned, use, compression, fault
):
    """A different read fails in each run: of a header, of ids, of the first layer, of the last layer."""
    preadv, model = os.preadv, ask.model
    settings = {**COLD, "compression": compression}
    with PrefixStore(tmp_path, **settings) as store, TieredCache(store) as cache:
        ids = ask(cache)
        ask(cache, ids)
    ids = ids.repeat(2, 1) if use == "batch" else ids
    mode = {"num_beams": 2} if use == "beams" else {}
    expected, failed_at = generate(model, ids, **mode).sequences, 0
    while True:
        reads = itertools.count()  # called by several threads

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
            # A read that ends early is repeated; the repetition may suffice.
            assert len(warned()) == (not finished) or fault is ended
            assert not finished or cache.last_turn.cached_tokens == (ids.shape[1] - 1) * len(ids)
            if finished:
                break
            # Each kept beam has its own block, which begins with the end of the prompt.
            assert cache.last_turn.cached_tokens < (ids.shape[1] - 1) * len(ids) or fault is ended or use == "beams"
            cache.reset()
            ask(cache, ids[:1])  # the lost blocks are stored again
        failed_at += 7 if use != "generate" else 3 if compression == "zstd" else 1
    assert failed_at > 20


@reuse_off
@pytest.mark.sample(1)  # of 4
@pytest.mark.parametrize("how", DAMAGES)
def test_block_damaged_before_the_first_forward_pass_keeps_generation_exact(tmp_path, ask, warned, how):
    """Its pages may have been loaded or not; in both cases attention sees no wrong pages."""
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
    assert len(warned()) <= 3  # one for each damaged block
    works_again(tmp_path, ask, ids, COLD)


# --- the catalog ------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)  # of 18
@pytest.mark.parametrize("settings", [COLD, WARM], ids=["cold", "warm"])
@pytest.mark.parametrize("files", [("",), ("-wal",), ("", "-wal", "-shm")], ids=lambda names: "+".join(names) or "main")
@pytest.mark.parametrize("how", ["delete", "empty", "garbage"])
def test_catalog_lost_under_a_running_store_keeps_generation_exact_and_is_rebuilt(
    tmp_path, ask, warned, settings, files, how
):
    with PrefixStore(tmp_path, **settings) as store, TieredCache(store) as cache:
        ids = ask(cache)
        store.flush()
        for suffix in files:
            path = Path(f"{tmp_path / 'catalog.sqlite'}{suffix}")
            if how == "delete":
                path.unlink()
            elif how == "empty":
                if suffix != "-shm":  # SQLite maps this file: truncating it always ends the process
                    os.truncate(path, 0)
            else:
                path.write_bytes(b"\xa5" * path.stat().st_size)
        for _ in range(3):
            ids = ask(cache, ids)
            cache.reset()
        store.flush()
        with contextlib.closing(TieredCache(store)) as other:
            ask(other, ids)
    assert len(warned()) <= 3  # for the catalog, for failed writes, for the rebuild
    with PrefixStore(tmp_path, **settings) as store, TieredCache(store) as cache:
        ask(cache, ids)
    works_again(tmp_path, ask, ids, settings)
    with PrefixStore(tmp_path, **settings) as store:
        assert bytes_on_disk(tmp_path) == store.stats().tiers[1].nbytes
        assert store.verify().ok


def test_one_turn_finds_and_rewrites_all_blocks_missing_from_disk(tmp_path, ask, warned):
    """One turn finds all missing blocks, and stores them again."""
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
def test_one_turn_finds_and_rewrites_all_blocks_with_damaged_pages(tmp_path, ask, warned, compression):
    """The blocks can still be opened. One turn finds all damaged blocks, and stores them again."""
    with PrefixStore(tmp_path, **COLD, compression=compression) as store, TieredCache(store) as cache:
        ids = ask(cache)
        ask(cache, ids)
        store.flush()
        chain = sorted(block_files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
        for path, end in zip(chain[1:], itertools.cycle([True, False]), strict=False):
            size = path.stat().st_size
            damage(path, "flip", at=-20 if end else size // 2)  # in the last layer, or in an earlier one
        cache.reset()
        ask(cache, ids)
        assert 0 <= cache.last_turn.cached_by_tier["disk"] <= 8
        cache.reset()
        ask(cache, ids)
        assert cache.last_turn.cached_by_tier["disk"] == ids.shape[1] - 1
    assert len(warned()) == 1


def test_catalog_with_a_flipped_header_byte_is_read_or_rebuilt(tmp_path, ask, warned):
    """The block files hold everything that the catalog said: it is read as it is, or rebuilt."""
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
