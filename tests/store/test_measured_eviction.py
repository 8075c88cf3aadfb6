"""What was measured decides which block goes first."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from benchmarks.block_workloads import TWO_MODELS, draw
from benchmarks.contenders import Library
from benchmarks.eviction import CONTENDERS, DEFAULT, UNMEASURED
from benchmarks.replay import Replay
from kvtier import PrefixStore
from kvtier.costs.prefill import PrefillSample
from kvtier.store.costs.books import CostBooks
from kvtier.store.eviction import Adaptive, LeastRecentlyUsed
from kvtier.store.tiers.host.tier import HostTier
from tests.support.measured import COST, measure
from tests.support.stores import OTHER_ROOT, ROOT, block, commit, count

SIZE = block(count(4)).nbytes


class Clock:
    now = 1e9

    def __call__(self):
        return self.now


@pytest.mark.parametrize("on_disk", [False, True])
def test_blocks_of_the_model_that_is_dear_to_compute_stay(tmp_path, on_disk):
    """Both models are asked the same; the blocks of the cheap one are always the later ones."""
    room = {"host_budget": 1, "disk_budget": 8 * 4096, "free_space_floor": 0} if on_disk else {"host_budget": 8 * SIZE}

    def left(factor):
        with PrefixStore(tmp_path / str(factor) if on_disk else None, block_size=4, **room) as store:
            measure(store, ROOT, factor=factor)
            measure(store, OTHER_ROOT)
            for first in range(0, 6000, 20):
                commit(store, count(4, first), ROOT)
                commit(store, count(4, first), OTHER_ROOT)
            store.flush()
            roots = Counter(entry.root for entry in store._tiers.entries())
        return roots[ROOT], roots[OTHER_ROOT]

    dear, cheap = left(16.0)
    assert dear >= cheap + 2
    alike, other = left(1.0)
    assert abs(alike - other) <= 1


def test_measured_costs_save_more_operations_where_two_models_share_a_store():
    trace = draw(TWO_MODELS, 1000, seed=5)
    room = 0.1 * sum(trace.sizes)
    names = DEFAULT, UNMEASURED, "LRU"
    measured, unmeasured, lru = (Replay(trace, CONTENDERS[name](trace), room).run().operations for name in names)
    assert measured >= unmeasured + 0.01
    assert measured >= lru + 0.01


def test_the_replay_tells_policies_what_blocks_save():
    trace = draw(TWO_MODELS, 100, seed=1)
    contender = Library(trace, Adaptive(), DEFAULT)
    contender.put(0)
    assert contender._blocks[0].saved_seconds == trace.saved_seconds[0] > 0


def test_a_root_that_is_not_known_saves_nothing_and_is_not_looked_up():
    def kept(root):
        raise AssertionError("no ranking may read files")

    books = CostBooks(kept, lambda root, costs: None, Clock())
    assert books.saved_seconds("host", ROOT, 256, 0, 1000) == 0.0
    assert not books.is_loaded_too_slowly("disk", ROOT, 256)
    assert books.known(ROOT) is None
    books.weigh(ROOT)


def test_ranking_waits_for_no_lock():
    """Tiers rank while they hold their own locks, which a thread with the lock of the books may wait for."""
    with PrefixStore(block_size=4) as store:
        measure(store)
        commit(store, count(4))
        saved = []
        with store._books.lock:
            thread = threading.Thread(target=lambda: saved.append(store._books.saved_seconds("host", ROOT, 4, 0, SIZE)))
            thread.start()
            thread.join(30)
            assert saved
    assert saved[0] > 0


def test_the_machine_that_computes_decides():
    with PrefixStore(block_size=4) as store:
        measure(store, factor=100.0, machine="slow")
        commit(store, count(4))
        slow = store._books.saved_seconds("host", ROOT, 4, 0, SIZE)
        measure(store, machine="fast")
        commit(store, count(8))
        assert store._books.saved_seconds("host", ROOT, 4, 0, SIZE) == pytest.approx(slow / 100, rel=0.1)
        store.costs(ROOT, "slow")
        commit(store, count(12))
        assert store._books.saved_seconds("host", ROOT, 4, 0, SIZE) == pytest.approx(slow, rel=0.1)


def test_costs_are_weighed_anew_when_there_is_news_but_not_in_every_turn():
    clock = Clock()
    with PrefixStore(block_size=4, clock=clock) as store:
        book = measure(store)
        commit(store, count(4))
        before = store._books.saved_seconds("host", ROOT, 4, 0, SIZE)
        for tokens in (1, 64, 700, 4096):
            for _ in range(5):
                book.note_pass(PrefillSample(tokens, 0, 10 * COST.seconds(tokens)))
        commit(store, count(8))
        assert store._books.saved_seconds("host", ROOT, 4, 0, SIZE) == before
        clock.now += 60
        commit(store, count(12))
        assert store._books.saved_seconds("host", ROOT, 4, 0, SIZE) == pytest.approx(10 * before, rel=0.1)


def test_ghosts_return_with_what_is_known_now():
    saves = {"seconds": 1.0}
    seen = []

    class Watching(LeastRecentlyUsed):
        def standing(self, usage, state):
            seen.append(usage.saved_seconds)
            return super().standing(usage, state)

    tier = HostTier(SIZE, Watching(), lambda: 0.0, saved_seconds=lambda *of: saves["seconds"])
    tier.put(block(count(4)))
    saves["seconds"] = 2.0
    tier.put(block(count(4, 100)))
    tier.put(block(count(4)))
    tier.touch([block(count(4)).id.key], {})
    assert seen == [1.0, 2.0, 2.0, 2.0]
