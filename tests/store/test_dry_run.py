"""Dry runs tell what the same call then removes, and change nothing; ``clear`` leaves an empty store."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier import ConfigurationError, PrefixStore, UnknownNameError
from kvtier.store.format.vocabulary import Vocabulary
from tests.support.stores import OTHER_ROOT, ROOT, block_files, commit, count, ids, restored_length

# Few ids, so that sequences share blocks; blocks of 2, so that chains have several.
sequences = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=6)


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


def filled(folder, lists, clock):
    store = PrefixStore(folder, block_size=2, clock=clock, ttl=5000, tail_delay=0)
    for n, tokens in enumerate(lists):
        commit(store, ids(*tokens))
        store.flush()
        clock.now += 100
        if n % 3 != 2:
            store.name(f"n{n}", ROOT, ids(*tokens), pin=n == 0, ttl=900 if n == 1 else None)
    return store


def state(store):
    return block_files(store.path), store.stats().tiers[1], store.names(), store.chains()


def _sum(forgotten):
    return sum(each.blocks for each in forgotten), sum(each.nbytes for each in forgotten)


@given(sequences, st.data())
def test_would_forget_is_what_forgetting_the_names_removes(lists, data):
    with tempfile.TemporaryDirectory() as folder, filled(Path(folder), lists, Clock()) as store:
        wanted = data.draw(st.lists(st.sampled_from([each.name for each in store.names()]), min_size=1, unique=True))
        before = state(store)
        told = store.would_forget(wanted)
        assert state(store) == before
        assert (told.blocks, told.nbytes) == _sum([store.forget(name) for name in wanted])


def test_would_forget_counts_blocks_that_only_the_names_together_use(tmp_path):
    with filled(tmp_path, [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], Clock()) as store:
        assert store.would_forget(["n0"]).blocks == store.would_forget(["n1"]).blocks == 1
        assert store.would_forget(["n0", "n1"]).blocks == len(block_files(tmp_path)) == 4


@given(sequences, st.data())
def test_would_forget_chain_is_what_forget_chain_removes(lists, data):
    with tempfile.TemporaryDirectory() as folder, filled(Path(folder), lists, Clock()) as store:
        key = data.draw(st.sampled_from([chain.key for chain in store.chains()]))
        before = state(store)
        told = store.would_forget_chain(key)
        assert state(store) == before
        assert told == store.forget_chain(key)


@given(
    sequences,
    st.one_of(st.none(), st.integers(0, 9000)),
    st.one_of(st.none(), st.integers(1, 700)),
    st.integers(0, 6000),
)
def test_would_prune_is_what_prune_removes(lists, to_bytes, unused_for, later):
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, filled(Path(folder), lists, clock) as store:
        to_bytes = None if to_bytes is None else to_bytes * 10
        clock.now += later
        before = block_files(store.path), store.stats().tiers[1]
        told = store.would_prune(to_bytes=to_bytes, unused_for=unused_for)
        assert (block_files(store.path), store.stats().tiers[1]) == before
        assert told == store.prune(to_bytes=to_bytes, unused_for=unused_for)


def test_dry_runs_refuse_what_the_calls_refuse():
    with PrefixStore() as store:
        with pytest.raises(UnknownNameError):
            store.would_forget(["nobody"])
        with pytest.raises(UnknownNameError):
            store.would_forget_chain("ab")
        with pytest.raises(ConfigurationError, match="to_bytes"):
            store.would_prune(to_bytes="much")
        with pytest.raises(ConfigurationError, match="needs a store with a folder"):
            store.would_prune(to_bytes=0)


def test_clear_removes_everything_and_the_store_goes_on(tmp_path):
    with PrefixStore(tmp_path, block_size=4) as store:
        for _ in range(2):
            commit(store, count(12))
            commit(store, count(7), OTHER_ROOT)
            store.keep_vocabulary(ROOT, lambda: Vocabulary.of({1: b"x"}))
            store.flush()
            store.name("kept", ROOT, count(12), pin=True)
            assert (tmp_path / "roots" / f"{ROOT}.json").exists()
            blocks = len(block_files(tmp_path))
            gone = store.clear()
            assert gone.blocks == blocks
            assert store.names() == store.chains() == ()
            assert list((tmp_path / "roots").iterdir()) == []
            assert block_files(tmp_path) == []
            assert store.stats().tiers[1].nbytes == 0
            assert restored_length(store, count(12)) == 0
            assert store.verify().ok


def test_clear_empties_a_store_in_ram():
    with PrefixStore(block_size=4) as store:
        commit(store, count(12))
        store.name("kept", ROOT, count(12), pin=True)
        assert store.clear().blocks == 3
        assert store.names() == store.chains() == ()
