"""A store folder with anything in place of its small files opens without waiting and loses no block."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvtier import ConfigurationError, PrefixStore, StoreError
from kvtier.store.tiers.disk import owners
from kvtier.store.tiers.disk.folder import read_record
from tests.support.odd_files import a_folder, a_link, a_pipe, a_sparse_giant, nothing
from tests.support.stores import ROOT, commit, count, restored_length

SETTINGS = {"block_size": 4, "host_budget": 1}
HUGE = 10**30


@pytest.fixture
def folder(tmp_path):
    """A store of 10 tokens under one name."""
    with PrefixStore(tmp_path / "kv", **SETTINGS) as store:
        commit(store, count(10))
        store.name("talk", ROOT, count(10))
    return tmp_path / "kv"


ODDITIES = pytest.mark.parametrize("put", [a_pipe, a_folder, a_link, a_sparse_giant, nothing])


@ODDITIES
@pytest.mark.parametrize("part", ["names", "roots"])
def test_store_opens_with_an_invalid_file_in_place_of_a_name_or_root(folder, put, part):
    put(next((folder / part).glob("*.json")))
    with PrefixStore(folder, **SETTINGS) as store:
        assert restored_length(store, count(10)) == 10
        commit(store, count(14))
        store.flush()
        assert restored_length(store, count(14)) == 14


@ODDITIES
def test_store_opens_with_an_invalid_file_in_place_of_an_owner_lock(folder, put):
    lock = folder / "owners" / f"{os.getpid()}-{'0' * 16}.lock"
    lock.write_bytes(b"x")
    put(lock)
    with PrefixStore(folder, **SETTINGS) as store:
        assert restored_length(store, count(10)) == 10


def test_owner_lock_that_cannot_be_opened_is_judged_by_its_process(folder, monkeypatch):
    """If root has used the folder, the process id in its lock's name tells whether root still does."""
    dead, alive = f"{2**22 + 1}-{'0' * 16}", f"{os.getppid()}-{'1' * 16}"
    for name in (dead, alive):
        (folder / "owners" / f"{name}.lock").touch()
    opened = os.open

    def refusing(path, *args, **kwargs):
        if Path(path).stem in (dead, alive):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(owners.os, "open", refusing)
    with PrefixStore(folder, **SETTINGS) as store:
        assert restored_length(store, count(10)) == 10
        assert [store._tiers.opened.owner.lives(name) for name in (dead, alive)] == [False, True]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", HUGE),
        ("tokens", float("nan")),
        ("created_at", HUGE),
        ("created_at", float("nan")),
        ("created_at", float("inf")),
        ("created_at", True),
        ("ttl_seconds", HUGE),
        ("ttl_seconds", 10**400),
        ("ttl_seconds", float("nan")),
        ("ttl_seconds", "30d"),
        ("pinned", HUGE),
        ("keys", "abc"),
        ("keys", {"a": 1}),
        ("root", HUGE),
        ("name", HUGE),
    ],
)
def test_name_file_with_an_invalid_value_is_logged_and_stops_nothing(folder, field, value, caplog):
    path = next((folder / "names").glob("*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with PrefixStore(folder, **SETTINGS) as store:
        assert restored_length(store, count(10)) == 10
    assert str(path) in caplog.text


@pytest.mark.parametrize("put", [a_pipe, a_sparse_giant, nothing, lambda path: path.write_text('{"format_version": 1')])
def test_damaged_marker_of_a_store_with_blocks_is_rewritten(folder, put, caplog):
    put(folder / "kvtier.json")
    with PrefixStore(folder, **SETTINGS) as store:
        assert restored_length(store, count(10)) == 10
    assert "its blocks show what it was" in caplog.text
    assert read_record(folder / "kvtier.json", 4096)["format_version"] == 1


def test_damaged_marker_without_blocks_is_refused_and_kept(tmp_path):
    (tmp_path / "kvtier.json").write_text("my notes")
    with pytest.raises(StoreError, match="not the marker of a store"):
        PrefixStore(tmp_path)
    assert (tmp_path / "kvtier.json").read_text() == "my notes"


@pytest.mark.parametrize("ttl", [HUGE, 10**400, float("inf"), float("nan"), 0, -1, True, "30 days"])
def test_invalid_ttl_is_refused(ttl):
    with pytest.raises(ConfigurationError, match="ttl="):
        PrefixStore(ttl=ttl)
