"""Window blocks in a store: kept beside blocks of a chain, found as spans, restored for the sliding layers alone."""

from __future__ import annotations

import pytest
import torch

from kvtier import PrefixStore
from tests.support.stores import ROOT, count, ids
from tests.support.windows import SLIDING, check_restored, found, keep

SIZE = 4


@pytest.fixture(params=["host", "raw", "zstd"])
def reopened(request, tmp_path):
    """Yield ``make`` and ``again``: ``again(store)`` is the next turn's store, in RAM the same, on disk a new one."""
    opened = []

    def make():
        if request.param == "host":
            opened.append(PrefixStore(block_size=SIZE))
        else:
            opened.append(PrefixStore(tmp_path, block_size=SIZE, compression=request.param))
        return opened[-1]

    def again(store):
        if request.param == "host":
            return store
        store.close()
        return make()

    yield make, again
    for store in opened:
        store.close()


def check(store, tokens, root=ROOT, slides=SLIDING):
    match = store.match(root, tokens)
    check_restored(store, match, store.windows(root, tokens, match), tokens, root, slides)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 11)], [(0, 11)]),
        ([(4, 11)], [(4, 11)]),
        ([(3, 11)], [(4, 11)]),
        ([(5, 11)], [(8, 11)]),
        ([(5, 10)], []),
        ([(0, 4), (8, 11)], [(0, 4), (8, 11)]),
        ([(0, 6), (6, 11)], [(0, 4), (8, 11)]),
        ([], []),
    ],
)
def test_blocks_within_a_span_get_window_blocks(reopened, spans, expected):
    make, again = reopened
    store = make()
    assert keep(store, count(11), *spans) == 11
    store = again(store)
    assert found(store, count(14)) == expected
    check(store, count(11))


def test_windows_are_cut_to_the_match(reopened):
    make, again = reopened
    store = make()
    keep(store, count(11), (0, 11))
    store = again(store)
    for limit in range(12):
        assert found(store, count(14), limit=limit) == ([(0, limit)] if limit else [])
    assert found(store, ids(0, 1, 2, 3, 4, 5, 77, 78)) == [(0, 6)]
    assert found(store, ids(0, 1, 77)) == [(0, 2)]
    assert found(store, ids(77)) == []
    check(store, ids(0, 1, 2, 3, 4, 5, 77, 78))


def test_shorter_window_tail_is_found_beside_a_longer_block(reopened):
    """The block of a later turn replaces the tail, and no window block replaces its window block."""
    make, again = reopened
    store = make()
    keep(store, count(6), (0, 6))
    keep(store, count(7))
    store = again(store)
    assert found(store, count(9)) == [(0, 6)]
    assert found(store, count(9), limit=5) == [(0, 5)]
    check(store, count(7))


def test_longer_window_tail_replaces_shorter_ones_and_never_blocks(reopened):
    make, again = reopened
    store = make()
    keep(store, count(5), (4, 5))
    store.flush()
    keep(store, count(7), (4, 7))
    store = again(store)
    assert found(store, count(9)) == [(4, 7)]
    assert store.stats().tiers[-1].blocks == 3  # a full block, a tail and its window block
    keep(store, count(8), (4, 8))
    store = again(store)
    assert found(store, count(9)) == [(4, 8)]
    assert store.stats().tiers[-1].blocks == 3
    check(store, count(8))


def test_windows_are_kept_once_and_do_not_count_as_new(reopened):
    make, again = reopened
    store = make()
    assert keep(store, count(11)) == 11
    store = again(store)
    assert keep(store, count(11), (0, 11)) == 0
    store = again(store)
    assert found(store, count(11)) == [(0, 11)]
    reads = store.stats().tiers[-1].blocks
    keep(store, count(10), (0, 10))
    assert store.stats().tiers[-1].blocks == reads == 6


def test_checkpoints_get_window_blocks(reopened):
    make, again = reopened
    store = make()
    states = {position: torch.full((8,), position, dtype=torch.uint8) for position in (3, 6, 7)}
    assert keep(store, count(7), (0, 7), states=states) == 4
    store = again(store)
    assert [position for position, _ in store.checkpoints(ROOT, count(9), 8)] == [7, 6, 3]
    assert found(store, count(9)) == [(0, 7)]
    ((position, checkpoint), *_) = store.checkpoints(ROOT, count(9), 8)
    windows = store.windows(ROOT, count(9), store.match(ROOT, count(9), position))
    job = store.restore([()], [checkpoint], [windows])
    assert torch.equal(job.states(0), states[7])
    assert job.spans(0, 0) == []
    assert job.spans(0, 1) == list(windows)
    job.close()


def test_model_whose_layers_all_slide(reopened):
    make, again = reopened
    store = make()
    keep(store, count(11), (4, 11), slides=(0, 1, 2))
    store = again(store)
    assert store.match(ROOT, count(20)).length == 11
    assert found(store, count(20)) == [(4, 11)]
    match = store.match(ROOT, count(11))
    windows = store.windows(ROOT, count(11), match)
    check_restored(store, match, windows, count(11), slides=(0, 1, 2))
    job = store.restore([()], windows=[windows])
    assert job.nbytes == 3 * 7 * 64
    job.close()
