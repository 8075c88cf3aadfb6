"""The disk tier: a budget in real bytes, recovery after crashes, and drives that fail."""

import errno
import json
import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from kvtier.errors import BlockError, StoreError, StoreVersionError
from kvtier.kv.codecs import BUILT_IN
from kvtier.kv.page import PageView
from kvtier.platform.filesystem import LOCAL, LocalFilesystem
from kvtier.store.block import Block
from kvtier.store.eviction import LeastRecentlyUsed
from kvtier.store.format.block_file import FORMAT_VERSION, BlockFile, encode_block
from kvtier.store.names import Name
from kvtier.store.tiers.base import PutResult
from kvtier.store.tiers.disk import eviction, recovery
from kvtier.store.tiers.disk.catalog.blocks import Prepared
from kvtier.store.tiers.disk.catalog.connection import connect
from kvtier.store.tiers.disk.folder import StoreFolder
from kvtier.store.tiers.disk.owners import Owner
from kvtier.store.tiers.disk.recovery import open_catalog
from kvtier.store.tiers.disk.tier import DiskTier
from kvtier.store.tiers.disk.writes import DiskSettings
from kvtier.store.tiers.shared_reads import HELD_BYTES
from kvtier.testing.faults import Faults, FaultyFilesystem
from tests.support.stores import ROOT, allocated, block, block_files, chain, count, leftovers, same_bits

SIZE = allocated(sum(piece.nbytes for piece in encode_block(block(count(4, first=10)))))
ROOMY = 100 * SIZE


class Opened(DiskTier):
    """A disk tier with its owner, database, names and audit."""

    def __init__(self, path, budget=ROOMY, codec="raw", *, clock=time.time, filesystem=LOCAL, **settings):
        folder = StoreFolder(path, filesystem, durable=True)
        self.owner = Owner(folder.owners)
        opened = open_catalog(folder, self.owner, LeastRecentlyUsed(), clock, connect)
        self.database, self.names, self.audit = opened.database, opened.names, opened.audit
        super().__init__(folder, opened.catalog, self.owner, DiskSettings(budget, BUILT_IN[codec], **settings), clock)

    def rows(self, statement, *values):
        with self.database.transaction() as connection:
            return connection.execute(statement, values).fetchall()

    def die(self):
        """End like a killed process: the system releases the lock, and nothing is cleaned up."""
        super().close()
        self.database.close()
        os.close(self.owner._fd)

    def close(self):
        super().close()
        self.database.close()
        self.owner.close()


@contextmanager
def opened(path, budget=ROOMY, codec="raw", **more):
    tier = Opened(path, budget, codec, **more)
    try:
        yield tier
    finally:
        tier.close()


def refused(path):
    Opened(path).close()


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("kvtier") and r.levelname == "WARNING"]


def assert_reads(tier, original):
    file = tier.open(original.id)
    assert file is not None
    assert file.id.tokens.tolist() == original.id.tokens.tolist()
    for layer, page in enumerate(original.pages):
        assert same_bits(file.page(layer).k_htd, page.k_htd)
        assert same_bits(file.page(layer).v_htd, page.v_htd)
    file.close()


def real_bytes(folder):
    return sum(allocated(path.stat().st_size) for path in block_files(folder))


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_blocks_are_readable_after_the_tier_is_reopened(tmp_path, codec):
    blocks = chain(count(10), 4)
    with opened(tmp_path, codec=codec) as tier:
        assert all(tier.put(each) for each in blocks)
    with opened(tmp_path) as tier:
        assert len(tier) == 3
        for each in blocks:
            assert each.id.key in tier
            assert_reads(tier, each)
        assert [child.key for child in tier.nearest(blocks[0].id.key, count(4, first=4))] == [blocks[1].id.key]


def test_store_files_are_private_in_a_folder_that_existed_before(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(0o755)  # the folder existed before
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


def test_created_store_folder_has_mode_0700(tmp_path):
    with opened(tmp_path / "a" / "b"):
        assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_the_budget_counts_real_bytes_and_evicts_leaves(tmp_path):
    with opened(tmp_path, 3 * SIZE + SIZE // 2) as tier:
        for first in range(0, 200, 10):
            for each in chain(count(8, first=first), 4):
                tier.put(each)
                assert real_bytes(tmp_path) == tier.nbytes <= tier.settings.budget_bytes
            for path in block_files(tmp_path):
                parent = tier.entry(path.stem).parent
                assert parent == ROOT or parent in tier
        assert len(block_files(tmp_path)) == len(tier) == 3


def test_block_larger_than_the_budget_is_not_stored(tmp_path):
    with opened(tmp_path, SIZE - 1) as tier:
        assert not tier.put(block(count(4, first=10)))
        assert block_files(tmp_path) == []


def test_chain_longer_than_the_budget_keeps_its_first_blocks(tmp_path, caplog):
    with opened(tmp_path, 2 * SIZE + SIZE // 2) as tier:
        results = [tier.put(each) for each in chain(count(16, first=10), 4)]
        kept, full, orphan = PutResult.KEPT, PutResult.NO_ROOM, PutResult.UNAVAILABLE
        assert results == [kept, kept, full, orphan]
        assert real_bytes(tmp_path) == tier.nbytes
        assert leftovers(tmp_path) == []
    assert "being written" not in " ".join(warnings(caplog))


def test_discarded_blocks_leave_no_file(tmp_path):
    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
        tier.discard(block(count(4)).id.key)
        tier.discard("ab" * 32)
        assert (block_files(tmp_path), tier.nbytes, len(tier)) == ([], 0, 0)
        assert tier.open(block(count(4)).id) is None


def test_opening_a_block_whose_file_is_missing_raises_block_error(tmp_path):
    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
        block_files(tmp_path)[0].unlink()
        with pytest.raises(BlockError):
            tier.open(block(count(4)).id)


def test_opening_a_block_file_replaced_by_another_raises_block_error(tmp_path):
    """The other block has the same tokens and root but another parent, so other K and V."""
    tokens = count(8)
    tokens[4:] = tokens[:4]
    first, second = chain(tokens, 4)
    with opened(tmp_path) as tier:
        tier.put(first)
        tier.put(second)
        places = {path.stem: path for path in block_files(tmp_path)}
        places[second.id.key].write_bytes(places[first.id.key].read_bytes())
        with pytest.raises(BlockError):
            tier.open(second.id)


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
def test_lost_or_damaged_catalog_is_rebuilt_from_the_files(tmp_path, damage, caplog):
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


def test_catalog_rebuild_removes_damaged_and_misplaced_files(tmp_path, caplog):
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
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("failing_call", [1, 2])
def test_full_disk_logs_one_warning_and_leaves_no_files(tmp_path, monkeypatch, caplog, failing_call):
    now = [0.0]
    with opened(tmp_path, clock=lambda: now[0]) as tier:
        calls = []

        def fsync(fd):
            calls.append(fd)
            if (len(calls) - 1) % failing_call == failing_call - 1:  # of the file, or of the folder after the rename
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            assert not tier.put(block(count(4)))
            calls.clear()
            now[0] += 100
            assert not tier.put(block(count(4, first=10)))
        now[0] += 100
        assert (block_files(tmp_path), leftovers(tmp_path), tier.nbytes, len(tier)) == ([], [], 0, 0)
        assert len(warnings(caplog)) == 1
        assert "No space left" in warnings(caplog)[0]
        assert tier.put(block(count(4)))  # the disk has space again
        assert_reads(tier, block(count(4)))


def test_short_write_leaves_no_partial_file_and_logs_one_warning(tmp_path, caplog):
    """The kernel itself refuses the bytes: first a short write, then an error."""
    large = Block(block(count(4)).id, block(count(4)).pages * 100)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with opened(tmp_path, 10**9) as tier:
        assert tier.put(block(count(4, first=10)))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        biggest = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
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


def test_root_manifest_that_cannot_be_written_logs_one_warning(tmp_path, monkeypatch, caplog):
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


def test_failing_catalog_gives_misses_and_one_warning_per_kind_of_operation(tmp_path, caplog):
    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
        tier.database.close()
        key = block(count(4)).id.key
        assert tier.entry(key) is None
        assert tier.nearest(ROOT, count(4)) == []
        assert tier.tails(ROOT, count(5)) == []
        assert tier.open(block(count(4)).id) is None
        assert key not in tier
        assert (tier.nbytes, len(tier)) == (0, 0)
        tier.touch([key], {key: 1})
        assert len(warnings(caplog)) == 1
        tier.discard(block(count(4)).id.key)
        assert not tier.put(block(count(4, first=10)))
        assert len(warnings(caplog)) == 3  # one for each kind of operation
    assert leftovers(tmp_path) == []


def test_block_of_an_unsupported_dtype_is_not_stored(tmp_path, caplog):
    import torch

    from kvtier.kv.page import Page

    pages = (Page(torch.zeros(1, 4, 2, dtype=torch.int8), torch.zeros(1, 4, 2, dtype=torch.int8)),)
    with opened(tmp_path) as tier:
        assert not tier.put(Block(block(count(4)).id, pages))
        assert (block_files(tmp_path), tier.nbytes) == ([], 0)
    assert len(warnings(caplog)) == 1


def half_a_file(tier, block, pid):
    path = tier.folder.block(block.id.key, block.id.root)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}-{pid}-{'0' * 32}.tmp")
    half.write_bytes(b"half a block")
    return half


def test_leftovers_of_dead_writers_are_cleaned_up(tmp_path):
    alive, dead = os.getppid(), dead_process()
    early, late, leaving = block(count(4, first=10)), block(count(4, first=20)), block(count(4, first=30))
    tier = Opened(tmp_path)
    tier.put(block(count(4)))
    places = (tmp_path / "roots", tmp_path / "names", tmp_path)
    swept = [place / f".x.json-{dead}-{'0' * 32}.tmp" for place in places]
    stays = [place / f".x.json-{alive}-{'0' * 32}.tmp" for place in places]
    foreign = tmp_path / ".some-foreign-file.tmp"
    for path in (*swept, *stays, foreign):
        path.write_bytes(b"half a file")
    # One block was being written, one had its file but no ready row, one was to be deleted.
    assert tier.catalog.prepare_store(early.id, SIZE, ROOMY, tier.owner.name) is Prepared.RESERVED
    swept.append(half_a_file(tier, early, os.getpid()))
    tier.put(late)
    tier.rows("UPDATE blocks SET state = ?, owner = ? WHERE key = ?", 1, tier.owner.name, bytes.fromhex(late.id.key))
    tier.put(leaving)
    tier.catalog.discard([leaving.id.key], tier.owner.name)
    tier.die()
    with opened(tmp_path) as tier:
        assert not any(path.exists() for path in swept)
        assert all(path.exists() for path in (*stays, foreign))
        assert len(tier) == len(block_files(tmp_path)) == 2
        assert tier.nbytes == real_bytes(tmp_path)
        assert_reads(tier, late)
        assert tier.put(early)
        assert tier.put(leaving)
        assert [path.stem for path in (tmp_path / "owners").iterdir()] == [tier.owner.name]


def test_block_half_written_by_a_dead_writer_is_not_adopted(tmp_path):
    """The drive can lose data that the system had not written out yet."""
    new = block(count(4))
    tier = Opened(tmp_path)
    tier.put(new)
    tier.rows("UPDATE blocks SET state = 1, owner = ?", tier.owner.name)
    tier.die()
    block_files(tmp_path)[0].write_bytes(b"")
    with opened(tmp_path) as tier:
        assert (len(tier), tier.nbytes, block_files(tmp_path)) == (0, 0, [])
        assert tier.put(new)


def test_unfinished_writes_and_deletes_of_a_live_store_are_left_alone(tmp_path):
    early, leaving = block(count(4, first=10)), block(count(4, first=30))
    with opened(tmp_path) as tier:
        tier.catalog.prepare_store(early.id, SIZE, ROOMY, tier.owner.name)
        half = half_a_file(tier, early, os.getpid())
        tier.put(leaving)
        tier.catalog.discard([leaving.id.key], tier.owner.name)
        with opened(tmp_path) as other:
            assert half.exists()
            assert other.nbytes == 2 * SIZE
            assert not other.put(leaving)
            assert (tmp_path / "owners" / f"{tier.owner.name}.lock").exists()


def test_opening_a_second_tier_keeps_a_write_in_progress(tmp_path, monkeypatch):
    fsync, seen = os.fsync, []

    def fsync_while_another_tier_opens(fd):
        if not leftovers(tmp_path):
            return  # fsync of a folder
        monkeypatch.setattr(os, "fsync", fsync)
        with opened(tmp_path) as other:
            seen.append((len(leftovers(tmp_path)), other.nbytes))
        fsync(fd)

    with opened(tmp_path) as tier:
        monkeypatch.setattr(os, "fsync", fsync_while_another_tier_opens)
        assert tier.put(block(count(4)))
        assert seen == [(1, tier.nbytes)]
        assert_reads(tier, block(count(4)))


@pytest.mark.parametrize("ending", ["it writes it", "it fails", "it dies"])
def test_put_waits_while_another_store_writes_the_same_block(tmp_path, ending):
    """A commit must neither end there nor count the block as stored before it is."""
    first, second = chain(count(8), 4)
    other, waited = Opened(tmp_path), []
    with opened(tmp_path) as tier:
        other.catalog.prepare_store(first.id, SIZE, ROOMY, other.owner.name)

        def meanwhile(seconds):
            waited.append(seconds)
            if ending == "it writes it":
                other.folder.write(other.folder.block(first.id.key, ROOT), encode_block(first))
                other.catalog.complete_store(first.id.key, other.owner.name)
            elif ending == "it fails":
                other.catalog.abort_store(first.id.key, other.owner.name)
            else:
                other.die()

        tier._writes._sleep = meanwhile
        assert tier.put(first)
        assert tier.put(second)
        assert len(waited) == 1
        assert_reads(tier, first)
        assert_reads(tier, second)
        assert tier.nbytes == real_bytes(tmp_path)
    other.database.close()


def test_put_gives_up_on_a_block_that_another_store_never_finishes(tmp_path, monkeypatch):
    monkeypatch.setattr("kvtier.store.tiers.disk.writes._ELSEWHERE_SECONDS", 0.0)
    first = block(count(4))
    with opened(tmp_path) as tier, opened(tmp_path) as other:
        other.catalog.prepare_store(first.id, SIZE, ROOMY, other.owner.name)
        assert not tier.put(first)


def test_failed_put_that_could_not_be_aborted_is_undone_by_the_next_put(tmp_path, monkeypatch, caplog):
    first, second = block(count(4)), block(count(4, first=10))
    with opened(tmp_path) as tier:

        def fail(*arguments):
            raise sqlite3.OperationalError("disk I/O error")

        with monkeypatch.context() as patched:
            patched.setattr(tier.catalog, "complete_store", fail)
            patched.setattr(tier.catalog, "abort_store", fail)
            assert not tier.put(first)
        assert tier.nbytes == SIZE
        assert tier.put(second)
        assert tier.nbytes == real_bytes(tmp_path) == SIZE
        assert tier.put(first)
        assert_reads(tier, first)


def test_discarded_block_is_not_found_even_if_the_catalog_cannot_discard_it(tmp_path, monkeypatch, caplog):
    """A full disk allows reads but no writes. A match that found a damaged block again would never end."""
    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
        key = block(count(4)).id.key

        def fail(*arguments):
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(tier.catalog, "discard", fail)
        tier.discard(key)
        assert tier.entry(key) is None
        assert tier.nearest(ROOT, count(4)) == []
    assert len(warnings(caplog)) == 1


def test_files_and_catalog_rows_are_reconciled_after_a_reboot(tmp_path, monkeypatch):
    """A power cut can lose catalog changes that were not written out yet."""
    unknown, missing, other = block(count(4)), block(count(4, first=10)), block(count(4, first=20))
    with opened(tmp_path) as tier:
        for each in (unknown, missing, other):
            tier.put(each)
        tier.rows("DELETE FROM blocks WHERE key = ?", bytes.fromhex(unknown.id.key))
        tier.folder.block(missing.id.key, ROOT).unlink()
        tier.catalog.set_bytes(other.id.key, 1)
        no_block = tier.folder.block("ff" * 32, ROOT)
        no_block.parent.mkdir(parents=True, exist_ok=True)
        no_block.write_bytes(b"no block")
    with opened(tmp_path) as tier:
        assert len(tier) == 2, "the same boot: nothing was lost, so nothing is looked for"
    monkeypatch.setattr(recovery, "boot_id", lambda: "another")
    with opened(tmp_path) as tier:
        assert len(tier) == len(block_files(tmp_path)) == 2
        assert_reads(tier, unknown)
        assert_reads(tier, other)
        assert tier.nbytes == real_bytes(tmp_path)


def test_free_space_floor_is_kept_by_evicting_or_refusing_blocks(tmp_path, caplog):
    class Drive(LocalFilesystem):
        def free_bytes(self, folder):
            return 10 * SIZE - sum(allocated(path.stat().st_size) for path in block_files(folder))

    with opened(tmp_path, filesystem=Drive(), floor_bytes=7 * SIZE) as tier:
        for first in range(0, 100, 10):
            assert tier.put(block(count(4, first=first)))
            assert tier.folder.free_bytes() >= 7 * SIZE
        assert len(tier) == 3
        assert tier.counts["evictions"] == 7
    with opened(tmp_path, filesystem=Drive(), floor_bytes=10 * SIZE) as tier:
        assert not tier.put(block(count(4, first=200)))
    assert "free_space_floor" in warnings(caplog)[0]


@pytest.mark.parametrize("pinned", [False, True])
def test_nothing_is_evicted_when_eviction_cannot_free_enough_space(tmp_path, monkeypatch, pinned):
    """Other files have filled the drive to below its floor, and this store may evict less than is needed."""

    class Drive(LocalFilesystem):
        free = 2**40

        def free_bytes(self, folder):
            return self.free

    monkeypatch.setattr(eviction, "_BATCH", 4)
    drive = Drive()
    with opened(tmp_path, filesystem=drive, floor_bytes=100 * SIZE) as tier:
        for each in chain(count(12), 4):
            assert tier.put(each)
        for first in range(100, 200, 10):
            assert tier.put(block(count(4, first=first)))
        if pinned:
            keys = tuple(each.id.key for each in chain(count(12), 4))
            tier.names.assign(Name("a", ROOT, keys, 12, True, None, 0.0))
        drive.free = (90 if pinned else 87) * SIZE  # 11 or 14 blocks short with the new one; the store has 13
        assert not tier.put(block(count(4, first=500)))
        assert len(tier) == 13
        drive.free += SIZE  # the unpinned blocks are just enough
        assert tier.put(block(count(4, first=500)))


class FullDrive(LocalFilesystem):
    """A drive that holds ``room`` block files and refuses more."""

    def __init__(self, room, number=errno.ENOSPC):
        super().__init__()
        self.room, self.number, self.tries = room, number, 0

    def write_whole(self, path, pieces, durable):
        if path.suffix == ".safetensors":
            self.tries += 1
            if len(list(path.parent.parent.rglob("*.safetensors"))) >= self.room:
                raise OSError(self.number, os.strerror(self.number))
        super().write_whole(path, pieces, durable)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_put_on_a_full_drive_evicts_blocks_and_continues(tmp_path, caplog, number):
    with opened(tmp_path, filesystem=FullDrive(2, number)) as tier:
        for first in range(0, 100, 10):
            assert tier.put(block(count(4, first=first)))
        assert len(tier) == 2
        assert tier.nbytes == real_bytes(tmp_path)
        assert tier.paused is None
    assert warnings(caplog) == []


def test_full_drive_with_nothing_to_evict_pauses_writes_until_it_has_space(tmp_path, caplog):
    now, drive = [0.0], FullDrive(0)
    drive.free_bytes = lambda folder: 0 if drive.room == 0 else 10**9
    with opened(tmp_path, filesystem=drive, clock=lambda: now[0]) as tier:
        drive.free_bytes = lambda folder: 10**9
        assert not tier.put(block(count(4)))
        assert "No space left" in tier.paused
        drive.free_bytes = lambda folder: 0
        tries = drive.tries
        assert not tier.put(block(count(4)))
        assert drive.tries == tries, "it does not try again and again"
        now[0], drive.room = 5, 9
        drive.free_bytes = lambda folder: 10**9
        assert tier.put(block(count(4)))
        assert tier.paused is None
    assert len(warnings(caplog)) == 1


def test_a_file_that_cannot_be_deleted_does_not_stop_evictions(tmp_path, caplog):
    class Sticky(LocalFilesystem):
        stuck = None

        def delete(self, path):
            if path.stem == self.stuck:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            return super().delete(path)

    drive = Sticky()
    first = block(count(4))
    with opened(tmp_path, 3 * SIZE, filesystem=drive) as tier:
        drive.stuck = first.id.key
        tier.put(first)
        for n in range(10, 100, 10):
            assert tier.put(block(count(4, first=n)))
            tier.touch([block(count(4, first=n)).id.key], {})
            assert real_bytes(tmp_path) == tier.nbytes <= 3 * SIZE
        assert first.id.key not in tier
        drive.stuck = None
        assert tier.put(block(count(4, first=200)))
        assert first.id.key not in {path.stem for path in block_files(tmp_path)}
        assert tier.put(block(count(4, first=210)))
        assert len(tier) == 3
    assert len(warnings(caplog)) == 1


def test_block_being_read_is_not_evicted_by_any_store(tmp_path):
    first, second = block(count(4)), block(count(4, first=10))
    with opened(tmp_path, SIZE) as tier, opened(tmp_path, SIZE) as other:
        tier.put(first)
        reader = tier.open(first.id)
        for each in (tier, other):
            assert not each.put(second)
            assert first.id.key in each
        reader.close()
        assert other.put(second)
        assert first.id.key not in tier


def test_open_readers_of_one_block_read_each_layer_once(tmp_path, monkeypatch):
    first, reads = block(count(4)), []
    page, landing = BlockFile.page, BlockFile.landing
    monkeypatch.setattr(BlockFile, "page", lambda self, layer: reads.append(layer) or page(self, layer))
    monkeypatch.setattr(
        BlockFile, "landing", lambda self, layer, *a, **k: reads.append(layer) or landing(self, layer, *a, **k)
    )
    with opened(tmp_path) as tier:
        tier.put(first)
        readers = [tier.open(first.id) for _ in range(3)]
        for reader in readers:
            for layer, expected in enumerate(first.pages):
                k_htd, v_htd = torch.zeros_like(expected.k_htd), torch.zeros_like(expected.v_htd)
                reader.landing(layer, 0, 4, PageView.on(k_htd, v_htd))()
                assert same_bits(k_htd, expected.k_htd)
                assert same_bits(v_htd, expected.v_htd)
        assert sorted(reads) == [0, 1]
        for reader in readers:
            reader.close()
        assert len(tier.leases) == 0
        assert tier._loads._left == HELD_BYTES
        alone = tier.open(first.id)
        k_htd, v_htd = torch.zeros_like(first.pages[0].k_htd), torch.zeros_like(first.pages[0].v_htd)
        alone.landing(0, 0, 4, PageView.on(k_htd, v_htd))()
        assert len(reads) > 2
        alone.close()


def test_reader_of_a_rewritten_block_does_not_share_reads_of_the_old_file(tmp_path):
    first = block(count(4))
    with opened(tmp_path) as tier:
        tier.put(first)
        reader = tier.open(first.id)
        tier.discard(first.id.key)
        tier.put(first)
        later = tier.open(first.id)
        assert later._load is not reader._load
        reader.close()
        assert same_bits(later.page(0).k_htd, first.pages[0].k_htd)
        later.close()


def test_symbolic_links_inside_a_store_are_refused(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    store = tmp_path / "store"
    new = block(count(4))
    with opened(store) as tier:
        tier.put(new)
    (store / "blocks" / ROOT).rename(elsewhere / ROOT)
    (store / "blocks" / ROOT).symlink_to(elsewhere / ROOT)
    with opened(store) as tier:
        with pytest.raises(BlockError, match="symbolic link"):
            tier.open(new.id)
        assert not tier.put(block(count(4, first=10)))
    assert len(list(elsewhere.rglob("*.safetensors"))) == 1
    for part in ("blocks", "roots", "names", "owners", "catalog.sqlite", "kvtier.json"):
        odd = tmp_path / f"odd-{part}"
        odd.mkdir()
        (odd / part).symlink_to(elsewhere)
        with pytest.raises(StoreError, match="symbolic link"):
            refused(odd)
    (tmp_path / "link").symlink_to(store)
    with opened(tmp_path / "link") as tier:  # the store folder itself may be a link: its owner made it
        assert not tier.put(block(count(4, first=30)))  # the folder of the root is still a link
        (store / "blocks" / ROOT).unlink()
        assert tier.put(block(count(4, first=30)))


@pytest.mark.parametrize("umask", [0, 0o777])
def test_files_and_folders_are_private_under_any_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with opened(tmp_path / "store") as tier:
            tier.put(block(count(4)))
            tier.describe_root(ROOT, {"model": "any"})
            paths = [tmp_path / "store", *(tmp_path / "store").rglob("*")]
            modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    finally:
        os.umask(before)
    for path, mode in modes.items():
        if path.suffix not in (".sqlite-wal", ".sqlite-shm", ".lock"):
            assert mode == (0o700 if path.is_dir() else 0o600), path
        assert not mode & 0o077, path


def test_root_manifest_that_differs_or_is_damaged_is_rewritten(tmp_path, caplog):
    with opened(tmp_path) as tier:
        tier.describe_root(ROOT, {"model": "tiny", "shape": (1, 2)})
        tier.describe_root(ROOT, {"model": "tiny", "shape": (1, 2)})
        assert warnings(caplog) == []
        for text in ("{", '{"model": "another"}', "[" * 5000):
            (tmp_path / "roots" / f"{ROOT}.json").write_text(text)
            tier.describe_root(ROOT, {"model": "tiny"})
            assert json.loads((tmp_path / "roots" / f"{ROOT}.json").read_text()) == {"model": "tiny"}
    assert len(warnings(caplog)) == 1


def test_second_store_on_a_network_drive_is_refused(tmp_path):
    class Network(LocalFilesystem):
        def kind(self, folder):
            return "nfs4"

    with opened(tmp_path, filesystem=Network()) as tier:
        assert tier.put(block(count(4)))
        with pytest.raises(StoreError, match="nfs4"):
            Opened(tmp_path, filesystem=Network())
        assert_reads(tier, block(count(4)))
    with opened(tmp_path, filesystem=Network()) as tier:
        assert_reads(tier, block(count(4)))


def test_catalog_found_damaged_in_use_is_rebuilt_at_the_next_open(tmp_path, caplog):
    """Damage deep inside the file shows only when that part is read."""

    def malformed():
        raise sqlite3.DatabaseError("database disk image is malformed")

    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
        tier.rows("UPDATE blocks SET hits = 77")
        assert tier.ask(malformed, "nothing") == "nothing"
    with opened(tmp_path) as tier:
        assert tier.entry(block(count(4)).id.key).hits == 0, "it is another catalog"
        assert not (tmp_path / "catalog.damaged").exists()
    assert len(warnings(caplog)) == 2


def test_catalog_with_zeroed_pages_is_rebuilt(tmp_path):
    with opened(tmp_path) as tier:
        for n in range(0, 400, 4):
            tier.put(block(count(4, first=n)))
    path = tmp_path / "catalog.sqlite"
    data = bytearray(path.read_bytes())
    data[3 * 8192 :] = bytes(len(data) - 3 * 8192)
    path.write_bytes(data)
    with opened(tmp_path) as tier:
        for n in range(0, 400, 4):
            tier.touch([block(count(4, first=n)).id.key], {})
            tier.entry(block(count(4, first=n)).id.key)
    with opened(tmp_path) as tier:
        assert len(tier) == 100


def test_store_of_a_newer_version_is_refused_and_left_alone(tmp_path):
    with opened(tmp_path) as tier:
        tier.put(block(count(4)))
    (tmp_path / "kvtier.json").write_text(json.dumps({"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(StoreVersionError, match="update kvtier or pass another folder"):
        refused(tmp_path)
    assert len(block_files(tmp_path)) == 1


@pytest.mark.parametrize("marker", ["", "{", "[]", "{}", '{"format_version": "1"}', '{"format_version": null}', "\0"])
def test_invalid_store_marker_is_refused(tmp_path, marker):
    (tmp_path / "kvtier.json").write_text(marker)
    with pytest.raises(StoreError, match=r"kvtier\.json is not the marker of a store"):
        refused(tmp_path)


def test_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="pass a folder you can write to"):
            refused(place)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "blocks").write_text("not a folder")
    with pytest.raises(StoreError, match="pass a folder you can write to"):
        refused(tmp_path / "odd")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(StoreError, match="pass a folder you can write to"):
        refused(folder)


def test_interrupted_catalog_rebuild_reads_only_files_without_a_ready_row(tmp_path):
    blocks = chain(count(12), 4)
    with opened(tmp_path) as tier:
        for each in blocks:
            tier.put(each)
        tier.rows("UPDATE blocks SET state = 1, owner = 'dead' WHERE key = ?", bytes.fromhex(blocks[2].id.key))
        tier.rows("DELETE FROM blocks WHERE key = ?", bytes.fromhex(blocks[1].id.key))
        tier.rows("PRAGMA user_version = 0")
        files = [tier.folder.block(each.id.key, ROOT) for each in blocks]
    drive = FaultyFilesystem(Faults())
    with opened(tmp_path, filesystem=drive) as tier:
        read = {subject for call, subject in drive.faults.met if call == "open" and subject.endswith(".safetensors")}
        assert read == {str(files[1]), str(files[2])}
        assert [tier.entry(each.id.key).depth_tokens for each in blocks] == [0, 4, 8]
        assert tier.nbytes == real_bytes(tmp_path)
    with opened(tmp_path) as tier:
        tier.rows("PRAGMA user_version = 0")
    files[2].unlink()  # while the rebuild is unfinished
    with opened(tmp_path) as tier:
        assert tier.entry(blocks[2].id.key) is None
