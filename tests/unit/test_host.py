"""The RAM tier keeps to its budget and loses leaves first."""

import threading

from hypothesis import given
from hypothesis import strategies as st
from storekit import ROOT, block, chain, count, ids, same_bits

from kvtier.store.host import HostTier

SIZE = block(count(4)).nbytes


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(0, 11)), max_size=12))
def test_the_budget_holds_after_every_put_and_no_block_outlives_its_parent(sequences):
    tier = HostTier(3 * SIZE + SIZE // 2)
    for tokens, discarded in sequences:
        for each in chain(ids(*tokens), 4):
            if each.id.parent != ROOT and each.id.parent not in tier:
                break  # what the store does: nothing is kept after a block that was not
            tier.put(each)
            assert tier.nbytes <= tier.budget_bytes
        kept = dict(tier._blocks)
        assert tier.nbytes == sum(b.nbytes for b in kept.values())
        assert all(b.id.parent == ROOT or b.id.parent in kept for b in kept.values())
        for leaf in [k for k in kept if not tier.children(k)][discarded:]:
            tier.discard(leaf)


def test_the_leaf_that_was_not_used_for_longest_goes():
    tier = HostTier(3 * SIZE)
    parent, child = chain(count(8), 4)
    other = block(count(4, first=50))
    for each in (parent, child, other):
        assert tier.put(each)
    tier.touch([child.id.key])
    assert tier.put(block(count(4, first=90)))
    assert parent.id.key in tier
    assert child.id.key in tier
    assert other.id.key not in tier


def test_the_parent_of_the_new_block_stays():
    tier = HostTier(SIZE)
    parent, child = chain(count(8), 4)
    assert tier.put(parent)
    assert not tier.put(child)
    assert parent.id.key in tier


def test_a_block_larger_than_the_budget_evicts_nothing():
    tier = HostTier(SIZE)
    small, large = block(count(4)), block(count(5, first=9))
    assert tier.put(small)
    assert not tier.put(large)
    assert not tier.put(large, writing=True)
    assert small.id.key in tier


def test_blocks_that_are_being_written_are_not_evicted_and_a_put_waits_for_them():
    tier = HostTier(SIZE)
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


def test_an_open_block_survives_its_eviction():
    tier = HostTier(SIZE)
    first = block(count(4))
    tier.put(first)
    reader = tier.open(first.id.key)
    tier.put(block(count(4, first=9)))
    assert first.id.key not in tier
    assert same_bits(reader.page(1).k_htd, first.pages[1].k_htd)


def test_what_is_not_there_is_nowhere():
    tier = HostTier(SIZE)
    tier.discard("nothing")
    tier.touch(["nothing"])
    assert tier.open("nothing") is None
    assert tier.find("nothing") is None
    assert tier.children("nothing") == []
    assert len(tier) == tier.nbytes == 0


def test_putting_a_block_twice_counts_it_once():
    tier = HostTier(SIZE)
    assert tier.put(block(count(4)))
    assert tier.put(block(count(4)))
    assert tier.nbytes == SIZE
    tier.discard(block(count(4)).id.key)
    assert tier.nbytes == 0
    assert tier.children(ROOT) == []


def test_a_forked_child_waits_for_no_block_that_its_parent_is_writing():
    tier = HostTier(SIZE)
    first, second = block(count(4)), block(count(4, first=9))
    tier.put(first, writing=True)
    tier.before_fork()
    tier.after_fork(in_child=False)
    assert first.id.key in tier
    tier.before_fork()
    tier.after_fork(in_child=True)
    assert first.id.key not in tier
    assert tier.put(second, writing=True)
