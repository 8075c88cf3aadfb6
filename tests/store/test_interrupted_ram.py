"""An interrupt at any line of a host tier call leaves its counts, lookups, expiry and eviction correct."""

import contextlib
import itertools

import pytest

from kvtier.store.eviction import LeastRecentlyUsed
from kvtier.store.tiers.host import ranking, residents, siblings
from kvtier.store.tiers.host import tier as host
from kvtier.store.tiers.host.tier import HostTier
from tests.support.interrupts import InterruptAtLine
from tests.support.stores import ROOT, block, chain, count

FILES = {module.__file__ for module in (host, ranking, residents, siblings)}
SIZE = block(count(4)).nbytes


class Scene:
    """A full tier: a chain of three blocks and three more blocks after the root, one leased and one pinned."""

    def __init__(self):
        self.now, self.pinned = 0.0, frozenset()
        self.tier = HostTier(6 * SIZE, LeastRecentlyUsed(), lambda: self.now, lambda: self.pinned)
        self.chain = chain(count(12), 4)
        self.others = [block(count(4, first=20 * at)) for at in (1, 2, 3)]
        for each in (*self.others, *self.chain):
            self.now += 1
            assert self.tier.put(each)
        self.reader = self.tier.open(self.others[0].id)
        self.pinned = frozenset([self.others[1].id.key])
        assert self.tier.put(block(count(4, first=80)))  # eviction skips the leased and the pinned block
        self.new = block(count(4, first=100))
        self.now += 1

    def put(self):
        self.tier.put(self.new, writing=True)

    def put_once_nothing_is_held(self):
        self.tier.put(self.new, writing=True)

    def prepare_put_once_nothing_is_held(self):
        self.reader.close()
        self.pinned = frozenset()

    def put_after_the_leaf_that_comes_first(self):
        self.tier.put(chain(count(16), 4)[3], writing=True)

    def prepare_put_after_the_leaf_that_comes_first(self):
        self.tier.touch([entry.key for entry in self.tier.entries() if entry.key != self.chain[2].id.key], {})

    def touch(self):
        self.tier.touch([each.id.key for each in (self.others[2], self.chain[0], self.chain[2])], {})

    def discard(self):
        self.tier.discard(self.chain[2].id.key)

    def shrink(self):
        self.tier.shrink(3 * SIZE)

    def close(self):
        self.reader.close()

    def look(self):
        """Call ``unused_since``, which puts the blocks in order."""
        self.tier.unused_since(self.now)

    def assert_sound(self):
        here = dict(self.tier._blocks.items())
        assert self.tier.nbytes == sum(each.block.nbytes for each in here.values()) <= self.tier.budget_bytes
        for entry in self.tier.entries():
            assert entry.children == sum(each.block.id.parent == entry.key for each in here.values())
        for each in here.values():
            (found,) = self.tier.nearest(each.block.id.parent, each.block.id.tokens)
            assert found.key == each.block.id.key
            old = {key for key, other in here.items() if other.used_at < each.used_at} - self.pinned
            assert set(self.tier.unused_since(each.used_at)) == old
        self.reader.close()
        self.pinned = frozenset()
        for key in here:
            self.tier.written(key)
        assert len(self.tier.shrink(0)) == len(here)
        assert self.tier.nbytes == 0
        assert self.tier.nearest(ROOT, count(4)) == []


@pytest.mark.parametrize(
    "call",
    [
        "put",
        "put_once_nothing_is_held",
        "put_after_the_leaf_that_comes_first",
        "touch",
        "discard",
        "shrink",
        "close",
        "look",
    ],
)
def test_interrupt_at_any_line_of_a_call_leaves_the_tier_consistent(call):
    for at in itertools.count():
        scene = Scene()
        getattr(scene, f"prepare_{call}", lambda: None)()
        interrupt = InterruptAtLine(at, FILES)
        with contextlib.suppress(KeyboardInterrupt), interrupt:
            getattr(scene, call)()
        scene.assert_sound()
        if not interrupt.came:
            break
    assert at > 0
