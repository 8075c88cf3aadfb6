"""Relative folders stay fixed when the current folder changes, and a missing home raises a clear error."""

from __future__ import annotations

import os
import pwd

import pytest

from kvtier import ConfigurationError, PrefixStore, TieredCache
from kvtier.platform.filesystem import folder_path, user_cache_folder
from tests.support.stores import commit, count, restored_length


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without a user entry that names a home, as in some containers."""

    def unknown(_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_relative_store_folder_survives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with PrefixStore("kv", block_size=4, host_budget=1) as store:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        commit(store, count(10))
        store.flush()
        assert restored_length(store, count(10)) == 10
    assert not (tmp_path / "elsewhere" / "kv").exists()
    assert store.path == tmp_path / "kv"


@pytest.mark.parametrize("make", [PrefixStore, TieredCache, lambda path: TieredCache(None, spill_dir=path)])
@pytest.mark.parametrize("path", ["~/kv", "~nobody-is-called-so/kv"])
def test_missing_home_folder_raises_an_error_that_says_what_to_set(homeless, make, path):
    with pytest.raises(ConfigurationError, match=r"set HOME, or pass an absolute path"):
        make(path)


def test_missing_spill_folder_raises_an_error_that_says_what_to_pass(homeless):
    with pytest.raises(ConfigurationError, match="pass spill_dir="):
        TieredCache(PrefixStore(), device_budget="1GiB")


def test_relative_path_in_a_deleted_folder_is_refused(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigurationError, match="relative to a folder that is gone"):
        folder_path("kv", "path")
    os.chdir(tmp_path)


def test_user_cache_folder_follows_xdg_cache_home_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_folder("x") == tmp_path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_folder("x") == tmp_path / ".cache"
