"""Handles of the same folder share one store, which the last handle closes."""

import copy
import io
import pickle

import pytest
import torch

from kvtier import ConfigurationError, PrefixStore, StoreError, TieredCache
from kvtier.store.open_stores import StoreHandle


def test_shared_store_closes_with_its_last_handle(tmp_path):
    first, second = StoreHandle(tmp_path / "a"), StoreHandle(str(tmp_path / "b" / ".." / "a"))
    assert first.store is second.store
    first.close()
    first.close()
    assert not second.store.closed
    second.close()
    assert second.store.closed
    third = StoreHandle(tmp_path / "a")
    assert third.store is not second.store
    second.close()  # already closed: the new store is not its own
    assert not third.store.closed
    third.close()


def test_different_folders_have_separate_stores(tmp_path):
    one, other = StoreHandle(tmp_path / "a"), StoreHandle(tmp_path / "b")
    assert one.store is not other.store
    one.close()
    assert not other.store.closed
    other.close()


def test_new_handle_replaces_a_closed_store(tmp_path):
    first = StoreHandle(tmp_path)
    first.store.close()
    second = StoreHandle(tmp_path)
    assert not second.store.closed
    first.close()
    assert not second.store.closed
    second.close()


def test_default_ram_store_outlives_its_caches():
    first = TieredCache()
    store = first.store
    first.close()
    assert not store.closed
    with TieredCache() as second:
        assert second.store is store


@pytest.mark.parametrize("store", [7, b"folder", object(), {"path": "x"}])
def test_store_argument_of_a_wrong_type_is_refused(store):
    with pytest.raises(ConfigurationError, match="neither a folder nor a PrefixStore"):
        TieredCache(store)


@pytest.mark.parametrize(
    "send", [pickle.dumps, copy.deepcopy, lambda store: torch.save({"store": store}, io.BytesIO())]
)
def test_pickling_or_copying_a_store_explains_how_to_share_it(tmp_path, send):
    with PrefixStore(tmp_path) as store, pytest.raises(TypeError, match=r"PrefixStore\(folder\)"):
        send(store)


# --- which folder, and its budget -------------------------------------------------------------------------------------


def test_cache_without_a_store_uses_the_folder_of_the_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTIER_STORE", str(tmp_path / "mine"))
    with TieredCache() as cache, cache.fork() as fork:
        assert cache.store.path == tmp_path / "mine"
        assert fork.store is cache.store
    monkeypatch.setenv("KVTIER_STORE", "")
    with TieredCache() as cache:
        assert cache.store.path is None
        monkeypatch.setenv("KVTIER_STORE", str(tmp_path / "other"))
        with cache.fork() as fork:  # of the cache, whatever the variable says by now
            assert fork.store is cache.store


def test_unusable_folder_of_the_environment_variable_is_explained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KVTIER_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(StoreError, match="KVTIER_STORE"):
        TieredCache()


def test_disk_budget_of_a_cache_is_that_of_its_store(tmp_path):
    with TieredCache(tmp_path, disk_budget="3MiB") as cache:
        assert cache.store.stats().tiers[1].budget_bytes == 3 * 2**20
        with TieredCache(tmp_path) as second, TieredCache(tmp_path, disk_budget=3 * 2**20) as third:
            assert cache.store is second.store is third.store
        with pytest.raises(ConfigurationError, match=rf"open with {3 * 2**20} bytes"):
            TieredCache(tmp_path, disk_budget="4MiB")
    with TieredCache(tmp_path, disk_budget="4MiB") as cache:  # closed meanwhile
        assert cache.store.stats().tiers[1].budget_bytes == 4 * 2**20


@pytest.mark.parametrize("budget", ["much", 0, 1.5])
def test_invalid_disk_budget_of_a_cache_is_refused(tmp_path, budget):
    with pytest.raises(ConfigurationError, match="disk_budget="):
        TieredCache(tmp_path, disk_budget=budget)


def test_disk_budget_without_a_folder_of_the_cache_is_refused(store):
    with pytest.raises(ConfigurationError, match="disk_budget='1GiB' needs a folder"):
        TieredCache(disk_budget="1GiB")
    with pytest.raises(ConfigurationError, match="pass it to the PrefixStore"):
        TieredCache(store, disk_budget="1GiB")
