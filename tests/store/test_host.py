"""The host (RAM) tier: its budget, eviction of leaves first, leases, waits and expiry."""

import gc
import threading
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from kvtier.store.block import Block
from kvtier.store.chain import BlockId, BlockKind
from kvtier.store.eviction import LeastRecentlyUsed
from kvtier.store.tiers.base import PutResult
from kvtier.store.tiers.host.tier import HostTier
from tests.support.stores import ROOT, block, chain, count, ids, same_bits

SIZE = block(count(4)).nbytes


def new_tier(budget_bytes, **more):
    return HostTier(budget_bytes, LeastRecentlyUsed(), lambda: 0.0, **more)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(0, 11)), max_size=12))
def test_the_budget_holds_after_every_put_and_no_block_outlives_its_parent(sequences):
    tier = new_tier(3 * SIZE + SIZE // 2)
    for tokens, discarded in sequences:
        for each in chain(ids(*tokens), 4):
            if each.id.parent != ROOT and each.id.parent not in tier:
                break  # as the store does: no block is kept after a missing one
            tier.put(each)
            assert tier.nbytes <= tier.budget_bytes
        kept = {key: resident.block for key, resident in tier._blocks.items()}
        assert tier.nbytes == sum(b.nbytes for b in kept.values())
        assert all(b.id.parent == ROOT or b.id.parent in kept for b in kept.values())
        for leaf in [k for k in kept if not tier.entry(k).children][discarded:]:
            tier.discard(leaf)


def test_put_evicts_the_least_recently_used_leaf():
    tier = new_tier(3 * SIZE)
    parent, child = chain(count(8), 4)
    other = block(count(4, first=50))
    for each in (parent, child, other):
        assert tier.put(each)
    tier.touch([child.id.key], {})
    assert tier.put(block(count(4, first=90)))
    assert parent.id.key in tier
    assert child.id.key in tier
    assert other.id.key not in tier


def test_put_does_not_evict_the_parent_of_the_new_block():
    tier = new_tier(SIZE)
    parent, child = chain(count(8), 4)
    assert tier.put(parent)
    assert not tier.put(child)
    assert parent.id.key in tier
    assert tier.put(block(count(4, first=9))), "the parent stays for its child alone"
    assert parent.id.key not in tier


def test_a_block_larger_than_the_budget_evicts_nothing():
    tier = new_tier(SIZE)
    small, large = block(count(4)), block(count(5, first=9))
    assert tier.put(small)
    assert not tier.put(large)
    assert not tier.put(large, writing=True)
    assert small.id.key in tier


def test_blocks_being_written_are_not_evicted_and_a_put_waits_for_them():
    tier = new_tier(SIZE)
    first, second = block(count(4)), block(count(4, first=9))
    assert tier.put(first, writing=True)
    assert not tier.put(second)
    put = threading.Thread(target=tier.put, args=(second,), kwargs={"writing": True})
    put.start()
    assert first.id.key in tier
    tier.written(first.id.key)
    put.join(timeout=30)
    assert not put.is_alive()
    assert first.id.key not in tier
    assert second.id.key in tier


def test_put_gives_up_after_its_longest_wait_for_other_writes():
    tier = new_tier(2 * SIZE, longest_wait_seconds=0)
    first, second = chain(count(8), 4)
    assert tier.put(first, writing=True)
    assert tier.put(second, writing=True)
    third = block(count(4, first=90))
    assert not tier.put(third, writing=True)
    assert third.id.key not in tier.leases
    tier.written(second.id.key)
    assert tier.put(third, writing=True)


def test_wakeups_by_other_writes_do_not_extend_the_wait_of_a_put():
    """Each finished write wakes up every waiting put; there may still be no room."""
    tier = new_tier(SIZE, longest_wait_seconds=0.05)
    tier.put(block(count(4)), writing=True)
    results, ended = [], threading.Event()

    def put():
        results.append(tier.put(block(count(4, first=9)), writing=True))
        ended.set()

    def wake():
        while not ended.is_set():
            tier.written("another")

    threads = [threading.Thread(target=each, daemon=True) for each in (put, wake)]
    for thread in threads:
        thread.start()
    assert ended.wait(timeout=30)
    assert results == [PutResult.NO_ROOM]
    for thread in threads:
        thread.join(timeout=30)


def test_block_put_by_another_thread_during_a_wait_is_counted_once():
    searched = threading.Event()
    tier = new_tier(2 * SIZE, pinned=lambda: searched.set() or frozenset())
    first, second = chain(count(8), 4)
    wanted = block(count(4, first=90))
    for each in (first, second):
        tier.put(each, writing=True)
    searched.clear()
    put = threading.Thread(target=tier.put, args=(wanted,), kwargs={"writing": True}, daemon=True)
    put.start()
    assert searched.wait(timeout=30)
    tier.before_fork()  # the lock is free once the other thread waits
    for each in (second, first):
        tier.discard(each.id.key)
    tier.put(wanted)
    tier.after_fork(in_child=False)
    put.join(timeout=30)
    assert not put.is_alive()
    assert tier.nbytes == SIZE
    tier.discard(wanted.id.key)
    assert tier.nearest(ROOT, count(4)) == []
    assert tier.nbytes == 0


def test_block_already_in_ram_is_leased_while_it_is_written():
    tier = new_tier(SIZE)
    first, second = block(count(4)), block(count(4, first=9))
    tier.put(first)
    assert tier.put(first, writing=True)
    assert tier.put(first, writing=True)
    assert not tier.put(second)
    tier.written(first.id.key)
    assert tier.put(second)


def test_leaf_skipped_for_a_lease_is_evicted_once_the_lease_is_collected():
    tier = new_tier(2 * SIZE)
    first, second, third, fourth = (block(count(4, first=at)) for at in (0, 10, 20, 30))
    for each in (first, second):
        tier.put(each)
    reader = tier.open(first.id)
    tier.put(third)
    assert first.id.key in tier
    del reader
    gc.collect()
    tier.put(fourth)
    assert first.id.key not in tier
    assert third.id.key in tier


def test_block_discarded_while_being_read_does_not_come_back():
    tier = new_tier(2 * SIZE)
    first, second, third, fourth = (block(count(4, first=at)) for at in (0, 10, 20, 30))
    for each in (first, second):
        tier.put(each)
    reader = tier.open(first.id)
    tier.put(third)
    tier.discard(first.id.key)
    reader.close()
    tier.put(fourth)
    assert [entry.key for entry in tier.shrink(0)] == [third.id.key, fourth.id.key]


def test_leaf_skipped_for_a_pin_is_evicted_once_it_is_unpinned():
    pinned = set()
    tier = new_tier(2 * SIZE, pinned=lambda: frozenset(pinned))
    first, second, third, fourth = (block(count(4, first=at)) for at in (0, 10, 20, 30))
    for each in (first, second):
        tier.put(each)
    pinned.add(first.id.key)
    tier.put(third)
    assert first.id.key in tier
    pinned.clear()
    tier.put(fourth)
    assert first.id.key not in tier
    assert third.id.key in tier


def test_blocks_expire_by_last_use_after_the_clock_is_set_back():
    now = [100.0]
    tier = HostTier(9 * SIZE, LeastRecentlyUsed(), lambda: now[0], ttl_seconds=10)
    first, second = block(count(4)), block(count(4, first=9))
    tier.put(first)
    now[0] = 50
    tier.put(second)
    assert tier.unused_since(75) == [second.id.key]
    now[0] = 61
    tier.expire()
    assert [entry.key for entry in tier.entries()] == [first.id.key]


def test_a_block_that_is_being_read_is_not_evicted():
    tier = new_tier(SIZE)
    first, second = block(count(4)), block(count(4, first=9))
    tier.put(first)
    reader, other = tier.open(first.id), tier.open(first.id)
    assert not tier.put(second)
    reader.close()
    reader.close()
    assert not tier.put(second), "another reader is left"
    other.close()
    assert tier.put(second)
    assert first.id.key not in tier


def test_garbage_collected_reader_releases_its_lease():
    tier = new_tier(SIZE)
    tier.put(block(count(4)))
    tier.open(block(count(4)).id)
    gc.collect()
    assert len(tier.leases) == 0
    assert tier.put(block(count(4, first=9)))


def test_open_reader_can_read_a_discarded_block():
    tier = new_tier(SIZE)
    first = block(count(4))
    tier.put(first)
    reader = tier.open(first.id)
    tier.discard(first.id.key)
    assert first.id.key not in tier
    assert same_bits(reader.page(1).k_htd, first.pages[1].k_htd)
    reader.close()


def test_pinned_block_is_not_evicted():
    first, second = block(count(4)), block(count(4, first=9))
    pinned = {first.id.key}
    tier = new_tier(SIZE, pinned=lambda: frozenset(pinned))
    tier.put(first)
    assert not tier.put(second)
    pinned.clear()
    assert tier.put(second)


def test_expired_block_is_not_found_and_is_removed_by_expire():
    now = [0.0]
    tier = HostTier(9 * SIZE, LeastRecentlyUsed(), lambda: now[0], ttl_seconds=10)
    old, new = block(count(4)), block(count(4, first=9))
    tier.put(old)
    tier.put(new)
    now[0] = 8
    tier.touch([new.id.key], {new.id.key: 2})
    now[0] = 12
    assert old.id.key not in tier
    assert tier.open(old.id) is None
    assert [each.key for each in tier.nearest(ROOT, count(4))] == [new.id.key]
    tier.expire()
    assert len(tier) == 1
    assert tier.entry(new.id.key).hits == 2


def test_unused_since_finds_an_old_block_behind_a_recently_used_one():
    now = [0.0]
    tier = HostTier(9 * SIZE, LeastRecentlyUsed(), lambda: now[0])
    first, second = block(count(4)), block(count(4, first=9))
    for each in (first, second):
        tier.put(each)
    now[0] = 8
    tier.touch([first.id.key], {})
    assert tier.unused_since(5) == [second.id.key]


def test_shrink_evicts_leaf_by_leaf():
    tier = new_tier(9 * SIZE)
    for each in chain(count(12), 4):
        tier.put(each)
    assert [entry.depth_tokens for entry in tier.shrink(SIZE)] == [8, 4]
    assert tier.nbytes == SIZE


def test_operations_on_a_missing_block_find_and_change_nothing():
    tier = new_tier(SIZE)
    tier.discard("nothing")
    tier.touch(["nothing"], {"nothing": 1})
    assert tier.open(block(count(4)).id) is None
    assert tier.find("nothing") is None
    assert tier.entry("nothing") is None
    assert tier.nearest("nothing", count(4)) == tier.tails("nothing", count(4)) == []
    assert len(tier) == tier.nbytes == 0


def test_blocks_of_all_kinds_with_the_same_ids_are_kept_apart():
    tier = new_tier(9 * SIZE)
    pages = block(count(4)).pages
    twins = [Block(BlockId.of(ROOT, ROOT, count(4), kind), pages) for kind in BlockKind]
    for put in permutations(twins):
        for discarded in permutations(twins):
            for each in put:
                assert tier.put(each)
            left = {each.id.key for each in twins}
            for each in discarded:
                assert {tail.key for tail in tier.tails(ROOT, count(5))} == left
                tier.discard(each.id.key)
                left.remove(each.id.key)
            assert tier.tails(ROOT, count(5)) == []


def test_putting_a_block_twice_counts_it_once():
    tier = new_tier(SIZE)
    assert tier.put(block(count(4)))
    assert tier.put(block(count(4)))
    assert tier.nbytes == SIZE
    tier.discard(block(count(4)).id.key)
    assert tier.nbytes == 0
    assert tier.nearest(ROOT, count(4)) == []


def test_forked_child_does_not_wait_for_writes_of_its_parent():
    tier = new_tier(SIZE)
    first, second = block(count(4)), block(count(4, first=9))
    tier.put(first, writing=True)
    tier.before_fork()
    tier.after_fork(in_child=False)
    assert first.id.key in tier
    tier.before_fork()
    tier.after_fork(in_child=True)
    assert first.id.key not in tier
    assert tier.put(second, writing=True)
