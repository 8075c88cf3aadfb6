"""What no turn gains by loading stays in RAM, where caches weigh costs."""

from __future__ import annotations

import logging

import pytest
import torch

from kvtier import PrefixStore
from kvtier.store.commit import Windows
from tests.support.dict_tier import DictTier
from tests.support.measured import measure
from tests.support.stores import ROOT, block, block_files, commit, count, restored_length, truth

SIZE = block(count(4)).nbytes

# 64 bytes a token of this model take 1 ms to compute: 64 kB/s.
TOO_SLOW = 2e3


def commit_weighing(store, tokens, root=ROOT):
    return store.commit(root, tokens, lambda start, stop: truth(root, tokens, start, stop), {"of": "a"}, weighs=True)


@pytest.fixture
def store(tmp_path):
    with PrefixStore(tmp_path, block_size=4) as store:
        yield store


def test_what_is_loaded_much_more_slowly_than_computed_stays_in_ram(store, caplog):
    caplog.set_level(logging.INFO, "kvtier.store")
    measure(store, speed=TOO_SLOW)
    assert commit_weighing(store, count(10)) == 10
    assert commit_weighing(store, count(18)) == 10  # its tail is another one
    store.flush()
    assert block_files(store.path) == []
    assert store.stats().not_worth_writing == 6
    assert store.stats().written_bytes == 0
    assert restored_length(store, count(18)) == 18
    assert len([each for each in caplog.records if "stay in RAM" in each.message]) == 1


@pytest.mark.parametrize(
    ("speed", "loads"), [(1e9, 4), (TOO_SLOW, 2), (6e4 / 3, 4)], ids=["fast", "few loads", "slower, of use beside"]
)
def test_all_else_is_written(store, speed, loads):
    measure(store, speed=speed, loads=loads)
    commit_weighing(store, count(10))
    store.flush()
    assert len(block_files(store.path)) == 3
    assert store.stats().not_worth_writing == 0


def test_a_cache_that_does_not_weigh_has_everything_written(store):
    measure(store, speed=TOO_SLOW)
    commit(store, count(10))
    store.flush()
    assert len(block_files(store.path)) == 3


@pytest.mark.parametrize("pin", [False, True])
def test_a_named_chain_is_written(store, pin):
    measure(store, speed=TOO_SLOW)
    commit_weighing(store, count(10))
    store.name("mine", ROOT, count(10), pin=pin)
    store.flush()
    assert len(block_files(store.path)) == 3
    commit_weighing(store, count(14))  # what follows has no name
    store.flush()
    assert store.named("mine").tokens == 10
    with PrefixStore(store.path, block_size=4) as other:
        assert restored_length(other, count(14)) == 10


def test_what_turns_out_to_be_worth_it_is_written_later(store):
    measure(store, speed=TOO_SLOW)
    commit_weighing(store, count(8))
    store.flush()
    assert block_files(store.path) == []
    commit(store, count(16))
    store.flush()
    assert len(block_files(store.path)) == 4


def test_what_is_on_disk_stays_and_is_found(store):
    commit(store, count(10))
    store.flush()
    measure(store, speed=TOO_SLOW)
    commit_weighing(store, count(14))
    store.flush()
    with PrefixStore(store.path, block_size=4) as other:
        assert restored_length(other, count(14)) == 10


@pytest.mark.parametrize("length", [8, 10])
@pytest.mark.parametrize("with_states", [False, True])
def test_checkpoints_and_windows_stay_too(store, length, with_states):
    """Also in the commits that follow, which know the blocks of the first one."""
    measure(store, speed=TOO_SLOW)

    def turn(n):
        tokens = count(n)

        def read(start, stop):
            return truth(ROOT, tokens, start, stop)

        states = {n: torch.ones(3, dtype=torch.uint8)} if with_states else None
        windows = Windows(((0, n),), read)
        store.commit(ROOT, tokens, read, None, states, windows=windows, weighs=True)
        store.flush()

    for n in (length, length, length + 3, 16):
        turn(n)
        assert block_files(store.path) == []
    assert store.stats().not_worth_writing > 8


def test_a_second_use_is_written_where_that_was_asked_for(tmp_path):
    with PrefixStore(tmp_path, block_size=4, write_on="second-use") as store:
        measure(store, speed=TOO_SLOW)
        for _ in range(2):
            commit_weighing(store, count(8))
        store.flush()
        assert len(block_files(store.path)) == 2
        assert store.stats().not_worth_writing == 0


def test_an_archive_is_written(tmp_path, store):
    commit(store, count(8))
    store.name("mine", ROOT, count(8))
    store.export("mine", tmp_path / "archive")
    with PrefixStore(tmp_path / "other", block_size=4) as other:
        measure(other, speed=TOO_SLOW)
        commit_weighing(other, count(4, 100))
        other.import_(tmp_path / "archive")
        other.flush()
        assert len(block_files(other.path)) == 2


def test_without_room_in_ram_nothing_is_kept(tmp_path):
    with PrefixStore(tmp_path, block_size=4, host_budget=2 * SIZE) as store:
        measure(store, speed=TOO_SLOW)
        assert commit_weighing(store, count(16)) == 8
        store.flush()
        assert block_files(store.path) == []
        assert restored_length(store, count(16)) == 8


def test_tiers_below_the_disk_get_everything(tmp_path):
    """They may be faster than the disk, and what they have is found by the blocks of the disk."""
    with PrefixStore(tmp_path, block_size=4, lower_tiers=[DictTier()]) as store:
        measure(store, speed=TOO_SLOW)
        commit_weighing(store, count(8))
        store.flush()
        assert len(block_files(store.path)) == 2


def test_a_store_in_ram_is_not_concerned():
    with PrefixStore(block_size=4) as store:
        measure(store, speed=TOO_SLOW)
        assert commit_weighing(store, count(8)) == 8
        assert store.stats().not_worth_writing == 0
