"""The cost of a host tier call does not grow with the number of blocks and siblings that the tier holds.

Cost is the number of Python lines that run, which other load on the machine does not change. Work of C code inside one
line (moving the rest of a list, comparing bytes) is not counted.
"""

import sys
from functools import partial

import pytest
import torch

import kvtier.store.tiers.host.tier
from kvtier.store.block import Block
from kvtier.store.chain import BlockId
from kvtier.store.eviction import Standing
from kvtier.store.eviction.adaptive import Adaptive
from kvtier.store.tiers.host.ranking import MOST_STALE, Leaves, Queue
from kvtier.store.tiers.host.tier import HostTier
from tests.support.stores import ROOT, ids

FEW, MANY = 100, 3000
ONE_BYTE = torch.zeros(1, dtype=torch.uint8)
FOLDER = kvtier.store.tiers.host.tier.__file__.rpartition("/")[0]


def lines(call):
    """Run ``call``; return how many lines of the host tier's code ran."""
    ran = 0

    def trace(frame, event, argument):
        nonlocal ran
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        ran += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return ran


def block(*tokens, parent=ROOT):
    """A block of one byte, without pages."""
    return Block(BlockId.of(ROOT, parent, ids(*tokens)), (), 0, ONE_BYTE)


class Filled:
    """A full tier of siblings. All but ten are leased, pinned, used by several turns, or none of these."""

    def __init__(self, blocks, kind):
        self.now = 0.0
        self.pinned = frozenset()
        self.tier = HostTier(blocks, Adaptive(), lambda: self.now, lambda: self.pinned, ttl_seconds=1e9)
        self.blocks = [block(1, number, 3) for number in range(blocks)]
        for each in self.blocks:
            assert self.tier.put(each)
        held = self.blocks[:-10]
        if kind == "leased":
            self.readers = [self.tier.open(each.id) for each in held]
        elif kind == "pinned":
            self.pinned = frozenset(each.id.key for each in held)
        elif kind == "used again":
            for _ in range(3):
                self.tier.touch([each.id.key for each in held], {})
        assert self.tier.put(block(2, 2))  # the first eviction skips the blocks that must stay

    def nearest(self):
        assert self.tier.nearest(ROOT, ids(1, 55, 4))

    def tails(self):
        assert self.tier.tails(ROOT, ids(1, 55, 3, 1))

    def put(self):
        assert self.tier.put(block(2, 3))

    def shrink(self):
        assert len(self.tier.shrink(self.tier.nbytes - 5)) == 5

    def touch(self):
        self.tier.touch([each.id.key for each in self.blocks[20:25]], {})

    def discard(self):
        self.tier.discard(self.blocks[50].id.key)

    def expire(self):
        self.tier.expire()


@pytest.mark.sample(11)  # of 28
@pytest.mark.parametrize("kind", ["free", "leased", "pinned", "used again"])
@pytest.mark.parametrize("call", ["nearest", "tails", "put", "shrink", "touch", "discard", "expire"])
def test_host_tier_call_costs_about_the_same_with_thirty_times_the_blocks(call, kind):
    few, many = (lines(getattr(Filled(blocks, kind), call)) for blocks in (FEW, MANY))
    assert few > 0
    assert many <= 2 * few + 20, (few, many)


def test_shrink_costs_about_the_same_per_block_in_a_larger_tier():
    tiers = [(Filled(blocks, "free").tier, blocks // 2) for blocks in (FEW, MANY)]
    few, many = (lines(partial(tier.shrink, half)) / half for tier, half in tiers)
    assert many <= 2 * few


def test_eviction_queue_bounds_its_stale_entries():
    queue = Queue()
    for number in range(5 * MOST_STALE):
        queue.add((float(number), 0, "again"))
        queue.add((0.0, number, str(number % 3)))
        assert len(queue) <= 2 * 4 + MOST_STALE
    assert queue.first() == (0.0, 5 * MOST_STALE - 3, str((5 * MOST_STALE - 3) % 3))
    for key in ("0", "1", "2", "again"):
        queue.drop(key)
    assert queue.first() is None
    queue.drop("again")


def test_ended_leases_are_cleared_by_a_put_without_an_eviction():
    ended = set()
    leaves = Leaves(lambda key: False, ended, frozenset)
    for number in range(10):
        ended.add(str(number))
        leaves.put("a", Standing(0, 0.0), number)
        assert not ended
