"""Whoever names the same folder has the same store; the last one out closes it."""

import copy
import io
import pickle

import pytest
import torch

from kvtier import ConfigurationError, PrefixStore, TieredCache
from kvtier.store.open_stores import StoreHandle


def test_the_last_one_out_closes_the_store(tmp_path):
    first, second = StoreHandle(tmp_path / "a"), StoreHandle(str(tmp_path / "b" / ".." / "a"))
    assert first.store is second.store
    first.close()
    first.close()
    assert not second.store.closed
    second.close()
    assert second.store.closed
    third = StoreHandle(tmp_path / "a")
    assert third.store is not second.store
    second.close()  # closed already: not its store any more
    assert not third.store.closed
    third.close()


def test_folders_do_not_share(tmp_path):
    one, other = StoreHandle(tmp_path / "a"), StoreHandle(tmp_path / "b")
    assert one.store is not other.store
    one.close()
    assert not other.store.closed
    other.close()


def test_a_store_that_was_closed_is_opened_anew(tmp_path):
    first = StoreHandle(tmp_path)
    first.store.close()
    second = StoreHandle(tmp_path)
    assert not second.store.closed
    first.close()
    assert not second.store.closed
    second.close()


def test_the_store_in_ram_outlives_its_caches():
    first = TieredCache()
    store = first.store
    first.close()
    assert not store.closed
    with TieredCache() as second:
        assert second.store is store


@pytest.mark.parametrize("store", [7, b"folder", object(), {"path": "x"}])
def test_what_is_no_folder_is_refused(store):
    with pytest.raises(ConfigurationError, match="neither a folder nor a PrefixStore"):
        TieredCache(store)


@pytest.mark.parametrize(
    "send", [pickle.dumps, copy.deepcopy, lambda store: torch.save({"store": store}, io.BytesIO())]
)
def test_a_store_says_how_another_process_gets_it(tmp_path, send):
    with PrefixStore(tmp_path) as store, pytest.raises(TypeError, match=r"PrefixStore\(folder\)"):
        send(store)
