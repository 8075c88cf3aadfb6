"""Budgets are about the bytes that a drive really gives away."""

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
    """A drive that gives a file whole clusters, and does not tell how large they are."""

    def used_bytes(self, path):
        return -(-path.lstat().st_size // CLUSTER) * CLUSTER


def real_bytes(path, used_bytes):
    return sum(used_bytes(file) for file in path.rglob("*.safetensors"))


def test_a_drive_with_large_clusters_holds_no_more_than_the_budget(tmp_path):
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


def test_a_block_that_takes_more_than_the_budget_is_not_kept(tmp_path):
    with PrefixStore(tmp_path, disk_budget=CLUSTER - 1, filesystem=Clusters(), **SETTINGS) as store:
        commit(store, count(4))
        store.flush()
        assert list(tmp_path.rglob("*.safetensors")) == []
        assert store.stats().tiers[1].nbytes == 0


def test_what_the_drive_says_is_asked(tmp_path):
    """A file that is sparse, or not written out, counts for its size; one that takes more, for that."""
    (tmp_path / "sparse").touch()
    with (tmp_path / "sparse").open("r+b") as file:
        file.truncate(1_000_000)
    drive = LocalFilesystem()
    assert drive.used_bytes(tmp_path / "sparse") == allocated(1_000_000)
    (tmp_path / "whole").write_bytes(bytes(5000))
    assert drive.used_bytes(tmp_path / "whole") >= allocated(5000)


def test_a_smaller_budget_holds_from_the_opening_on(tmp_path):
    size = allocated(sum(piece.nbytes for piece in encode_block(block(count(4)))))
    with PrefixStore(tmp_path, disk_budget=20 * size, **SETTINGS) as store:
        commit(store, count(80))
    with PrefixStore(tmp_path, disk_budget=5 * size, **SETTINGS) as store:
        assert store.stats().tiers[1].nbytes == 5 * size
        assert len(list(tmp_path.rglob("*.safetensors"))) == 5
        assert restored_length(store, count(80)) == 20


# --- what is deleted while somebody reads it --------------------------------------------------------------------------


def tails_of(path):
    return {file.stem for file in path.rglob("*.safetensors")}


@pytest.mark.parametrize("who", ["this store", "another store"])
def test_what_a_longer_block_replaces_stays_while_it_is_read(tmp_path, who):
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


def test_what_has_expired_or_is_pruned_stays_while_it_is_read(tmp_path):
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


def test_what_is_forgotten_is_deleted_at_once_and_its_reader_may_finish(tmp_path, monkeypatch):
    monkeypatch.setattr(descriptors.OF_THIS_PROCESS, "_most", 0)  # none stays open by chance
    with PrefixStore(tmp_path, **SETTINGS) as store:
        commit(store, count(8))
        store.flush()
        restore = store.restore([store.match(ROOT, count(8)).spans])
        assert store.forget(count(8)).blocks == 2
        assert tails_of(tmp_path) == set()
        pages = [restore.reader(span.block.key).page(1) for span in restore.spans(0)]
        assert [page.k_htd.tolist() for page in pages] == [
            truth(ROOT, count(8), start, start + 4)[1].k_htd.tolist() for start in (0, 4)
        ]
        restore.close()
        assert len(descriptors.OF_THIS_PROCESS) == 0


def test_a_block_that_was_written_anew_while_it_is_read_is_neither_damaged_nor_withheld(tmp_path, monkeypatch):
    """What another process does, whose leases do not hold everywhere: the reader looks again, and finds it."""
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
