"""The file tier: real bytes within the budget, and a disk that may fail at any moment."""

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest
from storekit import ROOT, block, block_files, chain, count, leftovers, same_bits

from kvtier.errors import BlockError, StoreError, StoreVersionError
from kvtier.store.base import Block
from kvtier.store.disk import DiskTier
from kvtier.store.format import FORMAT_VERSION, encode_block

SIZE = sum(piece.nbytes for piece in encode_block(block(count(4, first=10)), "raw"))
ROOMY = 100 * SIZE


@contextmanager
def opened(folder, budget=ROOMY, codec="raw"):
    tier = DiskTier(folder, budget, codec)
    try:
        yield tier
    finally:
        tier.close()


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("kvtier") and r.levelname == "WARNING"]


def assert_reads(tier, original):
    file = tier.open(original.id.key)
    assert file is not None
    assert file.id.tokens.tolist() == original.id.tokens.tolist()
    for layer, page in enumerate(original.pages):
        assert same_bits(file.page(layer).k_htd, page.k_htd)
        assert same_bits(file.page(layer).v_htd, page.v_htd)
    file.close()


def real_bytes(folder):
    return sum(path.stat().st_size for path in block_files(folder))


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_blocks_outlive_the_tier(tmp_path, codec):
    blocks = chain(count(10), 4)
    with opened(tmp_path, codec=codec) as tier:
        assert all(tier.put(each) for each in blocks)
    with opened(tmp_path) as tier:
        assert len(tier) == 3
        for each in blocks:
            assert each.id.key in tier
            assert_reads(tier, each)
        assert [child.key for child in tier.children(blocks[0].id.key)] == [blocks[1].id.key]


def test_only_the_user_can_read_what_is_stored(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(0o755)  # a folder that was there before
    before = os.umask(0)
    try:
        with opened(folder) as tier:
            tier.put(block(count(4)))
            tier.describe_root(ROOT, {"model": "any"})
            paths = sorted(folder.rglob("*"))
            modes = {path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in paths}
    finally:
        os.umask(before)
    assert any(path.suffix == ".safetensors" for path in paths)
    assert "catalog.sqlite-wal" in modes
    folders = {path.relative_to(folder).as_posix() for path in paths if path.is_dir()}
    assert modes == {name: 0o700 if name in folders else 0o600 for name in modes}


def test_a_folder_that_is_made_is_the_users_alone(tmp_path):
    with opened(tmp_path / "a" / "b"):
        assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_the_budget_counts_real_bytes_and_evicts_leaves(tmp_path):
    with opened(tmp_path, 3 * SIZE + SIZE // 2) as tier:
        for first in range(0, 200, 10):
            for each in chain(count(8, first=first), 4):
                tier.put(each)
                assert real_bytes(tmp_path) == tier.nbytes <= tier.budget_bytes
            for path in block_files(tmp_path):
                parent = tier.find(path.stem).parent
                assert parent == ROOT or parent in tier
        assert len(block_files(tmp_path)) == len(tier) == 3


def test_a_block_larger_than_the_budget_stays_out(tmp_path):
    with opened(tmp_path, SIZE - 1) as tier:
        assert not tier.put(block(count(4, first=10)))
        assert block_files(tmp_path) == []


def test_a_chain_longer_than_the_budget_keeps_its_beginning(tmp_path, caplog):
    with opened(tmp_path, 2 * SIZE + SIZE // 2) as tier:
        results = [tier.put(each) for each in chain(count(16, first=10), 4)]
        assert results == [True, True, False, False]
        assert real_bytes(tmp_path) == tier.nbytes
        assert leftovers(tmp_path) == []
    assert "being written" not in " ".join(warnings(caplog))


def test_discarded_blocks_leave_no_file(tmp_path):
    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
        tier.discard(block(count(4)).id.key)
        tier.discard("unknown")
        assert (block_files(tmp_path), tier.nbytes, len(tier)) == ([], 0, 0)
        assert tier.open(block(count(4)).id.key) is None


def test_a_file_that_is_gone_is_a_block_error(tmp_path):
    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
        block_files(tmp_path)[0].unlink()
        with pytest.raises(BlockError):
            tier.open(block(count(4)).id.key)


def test_a_file_in_the_place_of_another_is_a_block_error(tmp_path):
    """Same tokens, same root, another parent: other K and V."""
    tokens = count(8)
    tokens[4:] = tokens[:4]
    first, second = chain(tokens, 4)
    with opened(tmp_path) as tier:
        tier.put(first)
        tier.put(second)
        places = {path.stem: path for path in block_files(tmp_path)}
        places[second.id.key].write_bytes(places[first.id.key].read_bytes())
        with pytest.raises(BlockError):
            tier.open(second.id.key)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no database\n" * 1000),
        lambda path: path.write_bytes(path.read_bytes()[:100] + b"\xff" * 8000),
    ],
    ids=["lost", "empty", "text", "half"],
)
def test_a_catalog_that_is_lost_or_damaged_is_made_anew_from_the_files(tmp_path, damage, caplog):
    blocks = chain(count(10), 4)
    with opened(tmp_path) as tier:
        for each in blocks:
            tier.put(each)
    damage(tmp_path / "catalog.sqlite")
    with opened(tmp_path) as tier:
        for each in blocks:
            assert_reads(tier, each)
        assert len(tier) == 3
        assert tier.nbytes == real_bytes(tmp_path)
    assert len(warnings(caplog)) <= 1
    with opened(tmp_path) as tier:
        assert len(tier) == 3


def test_making_the_catalog_anew_removes_files_that_cannot_be_used(tmp_path, caplog):
    kept, damaged, misplaced = block(count(4)), block(count(4, first=10)), block(count(4, first=20))
    with opened(tmp_path) as tier:
        for each in (kept, damaged, misplaced):
            tier.put(each)
        places = {path.stem: path for path in block_files(tmp_path)}
    places[damaged.id.key].write_bytes(b"x" * 100)
    places[misplaced.id.key].write_bytes(places[kept.id.key].read_bytes())
    (tmp_path / "catalog.sqlite").unlink()
    with opened(tmp_path) as tier:
        assert len(tier) == 1
        assert_reads(tier, kept)
        assert tier.nbytes == real_bytes(tmp_path)
    assert block_files(tmp_path) == [places[kept.id.key]]
    assert len(warnings(caplog)) == 2


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_disk_that_is_full_costs_one_warning_and_leaves_nothing_behind(tmp_path, monkeypatch, caplog, failing_call):
    with opened(tmp_path) as tier:
        calls = []

        def fsync(fd):
            calls.append(fd)
            if (len(calls) - 1) % failing_call == failing_call - 1:  # the file's, or the folder's after its rename
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            assert not tier.put(block(count(4)))
            calls.clear()
            assert not tier.put(block(count(4, first=10)))
        assert (block_files(tmp_path), leftovers(tmp_path), tier.nbytes, len(tier)) == ([], [], 0, 0)
        assert len(warnings(caplog)) == 1
        assert "No space left" in warnings(caplog)[0]
        assert tier.put(block(count(4)))  # there is room again
        assert_reads(tier, block(count(4)))


def test_a_write_that_is_cut_short_leaves_nothing_behind(tmp_path, caplog):
    """The kernel itself refuses the bytes: first a short write, then an error."""
    large = Block(block(count(4)).id, block(count(4)).pages * 100)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with opened(tmp_path) as tier:
        assert tier.put(block(count(4, first=10)))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        biggest = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        tier.budget_bytes = 10 * biggest + 10 * large.nbytes
        large = Block(large.id, large.pages * (1 + 4 * biggest // large.nbytes))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * biggest, hard))
        try:
            assert not tier.put(large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert len(block_files(tmp_path)) == len(tier) == 1
        assert leftovers(tmp_path) == []
        assert tier.nbytes == real_bytes(tmp_path)
    assert len(warnings(caplog)) == 1


def test_a_manifest_that_cannot_be_written_costs_one_warning(tmp_path, monkeypatch, caplog):
    def fsync(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path) as tier:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            tier.describe_root(ROOT, {})
            tier.describe_root(ROOT, {})
        assert list((tmp_path / "roots").iterdir()) == []
        assert len(warnings(caplog)) == 1
        tier.describe_root(ROOT, {"model": "tiny"})
        assert json.loads((tmp_path / "roots" / f"{ROOT}.json").read_text()) == {"model": "tiny"}


def test_a_catalog_that_fails_costs_one_warning(tmp_path, caplog):
    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
        tier._catalog.close()
        assert tier.find("x") is None
        assert tier.children(ROOT) == []
        assert tier.open("x") is None
        assert "x" not in tier
        assert (tier.nbytes, len(tier)) == (0, 0)
        tier.touch(["x"])
        tier.discard(block(count(4)).id.key)
        assert len(warnings(caplog)) == 1
        assert not tier.put(block(count(4, first=10)))
    assert leftovers(tmp_path) == []


def test_a_dtype_that_files_cannot_hold_stays_out(tmp_path, caplog):
    import torch

    from kvtier.pages import Page

    pages = (Page(torch.zeros(1, 4, 2, dtype=torch.int8), torch.zeros(1, 4, 2, dtype=torch.int8)),)
    with opened(tmp_path) as tier:
        assert not tier.put(Block(block(count(4)).id, pages))
        assert (block_files(tmp_path), tier.nbytes) == ([], 0)
    assert len(warnings(caplog)) == 1


def test_what_dead_writers_left_is_swept(tmp_path):
    alive, dead = os.getppid(), dead_process()
    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
        folder = block_files(tmp_path)[0].parent
        places = (folder, tmp_path / "roots", tmp_path)
        swept = [place / f".x.safetensors-{dead}-{'0' * 32}.tmp" for place in places]
        stays = [place / f".x.safetensors-{alive}-{'0' * 32}.tmp" for place in places]
        foreign = folder / ".some-foreign-file.tmp"
        for path in (*swept, *stays, foreign):
            path.write_bytes(b"half a block")
        # One writer died before its rename, one after it.
        early, late = block(count(4, first=10)), block(count(4, first=20))
        tier.put(late)
        tier._catalog.reserve(early.id, 10, ROOMY)
        tier._catalog._connection.execute(
            "UPDATE blocks SET writer = ? WHERE key IN (?, ?)", (dead, early.id.key, late.id.key)
        )
    with opened(tmp_path) as tier:
        assert not any(path.exists() for path in swept)
        assert all(path.exists() for path in stays)
        assert len(tier) == 1
        assert tier.nbytes == real_bytes(tmp_path)
        assert tier.put(early)
        assert tier.put(late)
        assert_reads(tier, late)


def test_what_a_dead_writer_with_our_process_id_left_is_swept(tmp_path):
    """Containers start with the same process id again and again."""
    new = block(count(4))
    with opened(tmp_path) as tier:
        tier._catalog.reserve(new.id, 10, ROOMY)
        half = tmp_path / "blocks" / f".{new.id.key}.safetensors-{os.getpid()}-{'0' * 32}.tmp"
        half = tmp_path / "blocks" / ROOT / new.id.key[:2] / half.name
        half.parent.mkdir(parents=True)
        half.write_bytes(b"half a block")
    with opened(tmp_path) as tier:
        assert not half.exists()
        assert tier.nbytes == 0
        assert tier.put(new)


def test_what_this_process_is_writing_is_not_swept(tmp_path, monkeypatch):
    fsync, seen = os.fsync, []

    def fsync_while_another_tier_opens(fd):
        monkeypatch.setattr(os, "fsync", fsync)
        with opened(tmp_path) as other:
            seen.append((len(leftovers(tmp_path)), other.nbytes))
        fsync(fd)

    with opened(tmp_path) as tier:
        monkeypatch.setattr(os, "fsync", fsync_while_another_tier_opens)
        assert tier.put(block(count(4)))
        assert seen == [(1, tier.nbytes)]
        assert_reads(tier, block(count(4)))


def test_what_another_process_is_writing_may_be_followed(tmp_path):
    """Otherwise a commit would end at a block only because two processes keep it at once."""
    first, second = chain(count(8), 4)
    with opened(tmp_path) as tier, opened(tmp_path) as other:
        other._catalog.reserve(first.id, SIZE, ROOMY)
        assert tier.put(first)
        assert tier.put(second)
        assert first.id.key not in tier
        other._catalog.withdraw(first.id.key)
        assert tier.put(first)
        assert_reads(tier, first)
        assert_reads(tier, second)


def test_a_damaged_block_is_not_found_again_though_the_catalog_cannot_forget_it(tmp_path, caplog):
    """What a full disk does: reading works, writing does not. A match that finds it again would never end."""
    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
        key = block(count(4)).id.key
        tier._catalog._connection.execute("PRAGMA query_only = ON")
        tier.discard(key)
        assert tier.find(key) is None
        assert tier.children(ROOT) == []
        tier._catalog._connection.execute("PRAGMA query_only = OFF")
    assert len(warnings(caplog)) == 1


def test_files_that_the_catalog_forgot_are_swept(tmp_path):
    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
        tier.put(block(count(4, first=10)))
        tier._catalog.remove(block(count(4)).id.key)  # and then the process died, before it deleted the file
    with opened(tmp_path) as tier:
        assert len(block_files(tmp_path)) == len(tier) == 1
        assert tier.nbytes == real_bytes(tmp_path)


def test_a_store_of_a_newer_version_is_left_alone(tmp_path):
    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
    (tmp_path / "kvtier.json").write_text(json.dumps({"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(StoreVersionError, match="update kvtier or pass another folder"):
        DiskTier(tmp_path, ROOMY, "raw")
    assert len(block_files(tmp_path)) == 1


@pytest.mark.parametrize("marker", ["", "{", "[]", "{}", '{"format_version": "1"}', '{"format_version": null}', "\0"])
def test_a_marker_that_is_none_is_refused(tmp_path, marker):
    (tmp_path / "kvtier.json").write_text(marker)
    with pytest.raises(StoreError, match=r"kvtier\.json is not the marker of a store"):
        DiskTier(tmp_path, ROOMY, "raw")


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="pass a folder you can write to"):
            DiskTier(place, ROOMY, "raw")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "blocks").write_text("not a folder")
    with pytest.raises(StoreError, match="pass a folder you can write to"):
        DiskTier(tmp_path / "odd", ROOMY, "raw")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(StoreError, match="pass a folder you can write to"):
        DiskTier(folder, ROOMY, "raw")
