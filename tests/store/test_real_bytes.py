"""The disk budget counts the bytes that a drive really allocates; deletion respects blocks that are being read."""

import time

import pytest
import torch

from kvtier import PrefixStore
from kvtier.errors import RestoreError
from kvtier.kv.page import PageView
from kvtier.platform import descriptors
from kvtier.platform.filesystem import LocalFilesystem
from kvtier.store.format.block_file import encode_block
from tests.support.stores import ROOT, allocated, block, commit, count, restored_length, truth

CLUSTER = 64 * 1024
SETTINGS = {"block_size": 4, "host_budget": 1, "free_space_floor": 0}


class Clusters(LocalFilesystem):
    """A drive that allocates whole clusters and does not report their size."""

    def used_bytes(self, path):
        return -(-path.lstat().st_size // CLUSTER) * CLUSTER


def real_bytes(path, used_bytes):
    return sum(used_bytes(file) for file in path.rglob("*.safetensors"))


def test_disk_budget_holds_on_a_drive_with_large_clusters(tmp_path):
    drive = Clusters()
    with PrefixStore(tmp_path, disk_budget=10 * CLUSTER, filesystem=drive, **SETTINGS) as store:
        for n in range(30):
            commit(store, count(4, first=10 * n))
            store.flush()
            (_, disk) = store.stats().tiers
            assert disk.nbytes == real_bytes(tmp_path, drive.used_bytes) <= 10 * CLUSTER
        assert disk.blocks == 10
        assert store.verify().ok
    with PrefixStore(tmp_path, disk_budget=10 * CLUSTER, filesystem=drive, **SETTINGS) as store:
        commit(store, count(4))
        store.flush()
        assert real_bytes(tmp_path, drive.used_bytes) <= 10 * CLUSTER


def test_block_that_allocates_more_than_the_disk_budget_is_not_kept(tmp_path):
    with PrefixStore(tmp_path, disk_budget=CLUSTER - 1, filesystem=Clusters(), **SETTINGS) as store:
        commit(store, count(4))
        store.flush()
        assert list(tmp_path.rglob("*.safetensors")) == []
        assert store.stats().tiers[1].nbytes == 0


def test_used_bytes_count_the_file_size_or_a_larger_allocation(tmp_path):
    """A file that is sparse or not yet written out counts with its size, and a larger allocation counts in full."""
    (tmp_path / "sparse").touch()
    with (tmp_path / "sparse").open("r+b") as file:
        file.truncate(1_000_000)
    drive = LocalFilesystem()
    assert drive.used_bytes(tmp_path / "sparse") == allocated(1_000_000)
    (tmp_path / "whole").write_bytes(bytes(5000))
    assert drive.used_bytes(tmp_path / "whole") >= allocated(5000)


def test_smaller_disk_budget_is_enforced_when_the_store_opens(tmp_path):
    size = allocated(sum(piece.nbytes for piece in encode_block(block(count(4)))))
    with PrefixStore(tmp_path, disk_budget=20 * size, **SETTINGS) as store:
        commit(store, count(80))
    with PrefixStore(tmp_path, disk_budget=5 * size, **SETTINGS) as store:
        assert store.stats().tiers[1].nbytes == 5 * size
        assert len(list(tmp_path.rglob("*.safetensors"))) == 5
        assert restored_length(store, count(80)) == 20


# --- deletion while a block is read -----------------------------------------------------------------------------------


def tails_of(path):
    return {file.stem for file in path.rglob("*.safetensors")}


@pytest.mark.parametrize("who", ["this store", "another store"])
def test_tail_block_replaced_by_a_longer_one_stays_while_it_is_read(tmp_path, who):
    tail, longer = block(count(2)), block(count(3))
    with PrefixStore(tmp_path, tail_delay=0, **SETTINGS) as store, PrefixStore(tmp_path, **SETTINGS) as other:
        commit(store, count(2))
        store.flush()
        reading = (store if who == "this store" else other).restore([store.match(ROOT, count(2)).spans])
        commit(store, count(3))
        store.flush()
        assert tails_of(tmp_path) == {tail.id.key, longer.id.key}
        reading.close()
        commit(store, count(4))
        store.flush()
        assert tails_of(tmp_path) == {block(count(4)).id.key}


def test_expired_or_pruned_block_stays_while_it_is_read(tmp_path):
    now = [time.time()]
    settings = {**SETTINGS, "clock": lambda: now[0]}
    with PrefixStore(tmp_path, **settings) as store, PrefixStore(tmp_path, ttl=10.0, **settings) as other:
        commit(store, count(8))
        store.flush()
        reading = store.restore([store.match(ROOT, count(4)).spans])
        now[0] += 20.0
        assert other.prune().blocks == 1
        assert other.prune(unused_for=10.0).blocks == 0
        assert len(tails_of(tmp_path)) == 1
        reading.close()
        assert store.prune(unused_for=10.0).blocks == 1
        assert tails_of(tmp_path) == set()


def test_forgotten_block_is_deleted_at_once_and_open_readers_finish(tmp_path, monkeypatch):
    monkeypatch.setattr(descriptors.OF_THIS_PROCESS, "_most", 0)  # no descriptor stays open by chance
    with PrefixStore(tmp_path, **SETTINGS) as store:
        commit(store, count(8))
        store.flush()
        restore = store.restore([store.match(ROOT, count(8)).spans])
        assert store.forget(count(8)).blocks == 2
        assert tails_of(tmp_path) == set()
        pages = [restore.reader(span.block.key).page(1) for span in restore.spans(0, 1)]
        assert [page.k_htd.tolist() for page in pages] == [
            truth(ROOT, count(8), start, start + 4)[1].k_htd.tolist() for start in (0, 4)
        ]
        restore.close()
        assert len(descriptors.OF_THIS_PROCESS) == 0


def test_block_replaced_or_removed_while_read_is_neither_damaged_nor_withheld(tmp_path, monkeypatch):
    """Leases do not stop another process everywhere. After its change, the reader looks again and finds the block."""
    monkeypatch.setattr(descriptors.OF_THIS_PROCESS, "_most", 0)
    with PrefixStore(tmp_path, **SETTINGS) as store:
        commit(store, count(8))
        store.flush()
        for another in (True, False):
            restore = store.restore([store.match(ROOT, count(8)).spans])
            path = next(tmp_path.rglob("*.safetensors"))
            content = path.read_bytes()
            path.unlink()
            if another:
                path.write_bytes(content)
            restore.start(lambda layer, row: (PageView.on(torch.zeros(2, 8, 4), torch.zeros(2, 8, 4)), 0))
            with pytest.raises(RestoreError):
                restore.wait(0)
            restore.close()
            path.write_bytes(content)
            assert restored_length(store, count(8)) == 8
        misses = store.stats().misses
        assert misses["gone"] == 2
        assert "damaged" not in misses
        assert "unavailable" not in misses
