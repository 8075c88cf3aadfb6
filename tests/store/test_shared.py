"""Handles of the same folder share one store, which the last handle closes."""

import copy
import io
import pickle

import pytest
import torch

from kvtier import ConfigurationError, PrefixStore, TieredCache
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
