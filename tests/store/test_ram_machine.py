"""A state machine compares the host tier with a simple model that scans every block.

The model is a dictionary in the order of the puts. After each step both hold the same blocks, value them alike and have
evicted the same blocks in the same order. After an interrupt the model adopts the blocks that the tier holds; all that
the tier derives from them must still be correct.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.store.block import Block, Entry
from kvtier.store.chain import BlockId, BlockKind, common_run
from kvtier.store.eviction import Adaptive, LeastRecentlyUsed
from kvtier.store.eviction.base import Standing, Usage, fresh_state
from kvtier.store.tiers.backoff import Withheld
from kvtier.store.tiers.host import ranking, residents, siblings
from kvtier.store.tiers.host import tier as host
from kvtier.store.tiers.host.tier import HostTier
from tests.support.interrupts import InterruptAtLine
from tests.support.stores import ROOT, ids

FILES = {module.__file__ for module in (host, ranking, residents, siblings)}
TTL = 20.0


class Coarse:
    """A policy that gives many blocks the same value, across both queues."""

    name = "coarse/1"
    queues = 2
    initial: ClassVar = {"stay": 0.0}

    def is_sound(self, state):
        return True

    def standing(self, usage, state):
        return Standing(int(usage.uses > 1), float((state.clock + usage.depth_tokens) // 4))

    def lead(self, queue, state):
        return float(state.clock % 3) * queue

    def evicted(self, usage, state):
        return state.learn(stay=state.learnt["stay"] + 1)

    def returned(self, ghost, state):
        return state.learn(stay=0.0)


@dataclass
class Known:
    block: Block
    usage: Usage
    standing: Standing
    used_at: float
    hits: int = 0

    @property
    def key(self):
        return self.block.id.key


class Model:
    """The expected state of the tier, computed from all blocks."""

    def __init__(self, budget_bytes, policy, clock, ttl):
        self.budget_bytes, self.policy, self.clock, self.ttl = budget_bytes, policy, clock, ttl
        self.state = fresh_state(self.policy)
        self.blocks: dict[str, Known] = {}
        self.ghosts: dict[str, Usage] = {}
        self.leases: Counter[str] = Counter()
        self.writing: set[str] = set()
        self.pinned: frozenset[str] = frozenset()
        self.withheld = Withheld(clock)
        self.counts: Counter[str] = Counter()

    @property
    def nbytes(self):
        return sum(known.block.nbytes for known in self.blocks.values())

    def children(self, key):
        return sum(known.block.id.parent == key for known in self.blocks.values())

    def may_go(self, key):
        is_held = self.leases[key] or key in self.writing or key in self.pinned
        return not is_held and not self.children(key)

    def least_valued(self, keep):
        best, least = None, 0.0
        for key, known in self.blocks.items():
            value = known.standing.priority + self.policy.lead(known.standing.queue, self.state)
            if (best is None or value < least) and key != keep and self.may_go(key):
                best, least = key, value
        return best

    def evict(self, key):
        known = self.blocks[key]
        self.state = self.policy.evicted(known.usage, self.state)
        self.ghosts[key] = known.usage
        while len(self.ghosts) > len(self.blocks):
            del self.ghosts[next(iter(self.ghosts))]
        self.counts["evictions"] += 1
        self.discard(key)

    def discard(self, key):
        self.blocks.pop(key, None)
        self.writing.discard(key)

    def put(self, block, writing):
        key, size = block.id.key, block.nbytes
        if key not in self.blocks:
            if size > self.budget_bytes:
                return False
            while self.nbytes + size > self.budget_bytes:
                victim = self.least_valued(block.id.parent)
                if victim is None:
                    return False
                self.evict(victim)
            usage = Usage(0, self.state.clock, len(block.id.tokens), block.depth_tokens, size)
            if key in self.ghosts:
                ghost = self.ghosts.pop(key)
                self.state = self.policy.returned(ghost, self.state)
                usage = replace(ghost, last_use=self.state.clock, nbytes=size)
            self.blocks[key] = Known(block, usage, self.policy.standing(usage, self.state), self.clock())
        if writing:
            self.writing.add(key)
        return True

    def shrink(self, to_bytes):
        gone = []
        while self.nbytes > to_bytes and (victim := self.least_valued("")) is not None:
            gone.append(victim)
            self.evict(victim)
        return gone

    def touch(self, keys, hits):
        self.state = self.state.tick()
        for key in keys:
            if key in self.blocks:
                known = self.blocks[key]
                known.usage = known.usage.used(self.state.clock)
                known.standing = self.policy.standing(known.usage, self.state)
                known.used_at = self.clock()
        for key, n in hits.items():
            if key in self.blocks:
                self.blocks[key].hits += n

    def unused_since(self, since):
        return {k for k, known in self.blocks.items() if known.used_at < since and k not in self.pinned}

    def expire(self):
        if self.ttl is not None:
            for key in self.unused_since(self.clock() - self.ttl):
                self.counts["expirations"] += 1
                self.discard(key)

    def is_found(self, key):
        if key in self.withheld:
            return False
        return self.ttl is None or self.blocks[key].used_at >= self.clock() - self.ttl or key in self.pinned

    def following(self, parent):
        return [
            known.block.id for k, known in self.blocks.items() if known.block.id.parent == parent and self.is_found(k)
        ]

    def longest_run(self, parent, tokens, windows):
        blocks = [block for block in self.following(parent) if block.is_window == windows]
        return max((common_run(block.tokens, tokens) for block in blocks), default=None)

    def tails(self, parent, tokens):
        return {
            block.key
            for block in self.following(parent)
            if len(block.tokens) < len(tokens) and common_run(block.tokens, tokens) == len(block.tokens)
        }

    def entries(self):
        return {
            Entry(
                key,
                known.block.id.parent,
                ROOT,
                len(known.block.id.tokens),
                known.usage.depth_tokens,
                known.block.nbytes,
                self.children(key),
                known.usage.uses,
                known.hits,
                known.used_at,
                key in self.pinned,
                known.block.id.is_window,
            )
            for key, known in self.blocks.items()
            if self.is_found(key)
        }


# The tier sorts ids by their bytes, little-endian: 256 comes before 1 and before 255.
TOKENS = st.lists(st.sampled_from([0, 1, 255, 256, 511]), min_size=1, max_size=4).map(tuple)
CALLS = st.sampled_from(["put", "put for writing", "discard", "touch", "shrink", "expire", "close", "unused"])


class RamMachine(RuleBasedStateMachine):
    @initialize(
        budget=st.sampled_from([6, 20, 60]),
        policy=st.sampled_from([Adaptive, LeastRecentlyUsed, Coarse, Coarse]),
        ttl=st.sampled_from([None, TTL]),
        begun=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=12),
    )
    def begin(self, budget, policy, ttl, begun):
        self.now = 1000.0
        self.model = Model(budget, policy(), lambda: self.now, ttl)
        self.tier = HostTier(
            budget,
            policy(),
            lambda: self.now,
            lambda: self.model.pinned,
            ttl,
            longest_wait_seconds=0,
        )
        self.made: dict[str, Block] = {}
        self.readers = []
        for parent, turns in begun:
            self.put_and_touch(list(self.made)[parent] if parent < len(self.made) else ROOT, turns)

    def put_and_touch(self, parent, turns):
        block = self.made_block(parent, ids(len(self.made)), 1, BlockKind.PAGES)
        assert bool(self.tier.put(block)) == self.model.put(block, False)
        for _ in range(turns):
            self.tier.touch([block.id.key], {})
            self.model.touch([block.id.key], {})

    def made_block(self, parent, tokens, size, kind):
        identity = BlockId.of(ROOT, parent, tokens, kind)
        before = self.made.get(parent)
        depth = before.depth_tokens + len(before.id.tokens) if before is not None else 0
        return self.made.setdefault(identity.key, Block(identity, (), depth, torch.zeros(size, dtype=torch.uint8)))

    def draw_block(self, data):
        """Return a new block after the root or after any block ever made, or one of those blocks."""
        parents = [ROOT, *(key for key, block in self.made.items() if block.id.is_a(BlockKind.PAGES))]
        parent = data.draw(st.sampled_from(parents), label="parent")
        tokens = ids(*data.draw(TOKENS, label="tokens"))
        size = data.draw(st.integers(1, 4), label="bytes")
        return self.made_block(parent, tokens, size, data.draw(st.sampled_from(BlockKind), label="kind"))

    def draw_key(self, data):
        """Return the key of a stored block; if none is stored, the key of a former one."""
        return data.draw(st.sampled_from(sorted(self.model.blocks) or sorted(self.made) or ["nothing"]), label="key")

    # --- turns ----------------------------------------------------------------------------------------------------

    @rule(data=st.data(), writing=st.booleans())
    def put(self, data, writing):
        block = self.draw_block(data)
        assert bool(self.tier.put(block, writing=writing)) == self.model.put(block, writing)

    @precondition(lambda self: self.made)
    @rule(data=st.data(), writing=st.booleans())
    def put_what_was_here(self, data, writing):
        block = self.made[data.draw(st.sampled_from(sorted(self.made)), label="key")]
        assert bool(self.tier.put(block, writing=writing)) == self.model.put(block, writing)

    @rule(data=st.data())
    def written(self, data):
        key = self.draw_key(data)
        self.tier.written(key)
        self.model.writing.discard(key)

    @rule(data=st.data(), times=st.integers(1, 3))
    def touch(self, data, times):
        keys = data.draw(st.lists(st.sampled_from(sorted(self.model.blocks) or ["nothing"]), max_size=4), label="keys")
        for _ in range(times):
            self.tier.touch(keys, Counter(keys[:1]))
            self.model.touch(keys, Counter(keys[:1]))

    @rule(data=st.data())
    def lease(self, data):
        key = self.draw_key(data)
        is_found = key in self.model.blocks and self.model.is_found(key)
        reader = self.tier.open(self.made[key].id) if key in self.made else None
        assert (reader is not None) == is_found
        if reader is not None:
            self.model.leases[key] += 1
            self.readers.append(reader)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), is_lost=st.booleans())
    def end_a_lease(self, data, is_lost):
        reader = self.readers[data.draw(st.integers(0, len(self.readers) - 1), label="reader")]
        self.end_the_lease_of(reader, is_lost=is_lost)

    def end_the_lease_of(self, reader, *, is_lost=False):
        self.readers.remove(reader)
        self.model.leases[reader.id.key] -= 1
        if not is_lost:  # otherwise it is garbage-collected once nothing refers to it
            reader.close()

    # --- user calls and time --------------------------------------------------------------------------------------

    @rule(data=st.data())
    def pin(self, data):
        self.model.pinned = frozenset(
            data.draw(st.lists(st.sampled_from(sorted(self.made) or ["nothing"]), max_size=3))
        )

    @rule(data=st.data())
    def discard(self, data):
        key = self.draw_key(data)
        self.tier.discard(key)
        self.model.discard(key)

    @rule(nbytes=st.integers(1, 8) | st.just(100))
    def shrink(self, nbytes):
        to_bytes = self.model.nbytes - nbytes
        assert [entry.key for entry in self.tier.shrink(to_bytes)] == self.model.shrink(to_bytes)

    @rule(data=st.data())
    def withhold(self, data):
        key = self.draw_key(data)
        self.tier.withhold([key])
        self.model.withheld.add([key])

    @rule(seconds=st.sampled_from([0.5, 1, 5, 15, 30, -7, -40]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def expire(self):
        self.tier.expire()
        self.model.expire()

    @rule(data=st.data())
    def unused(self, data):
        times = sorted({known.used_at for known in self.model.blocks.values()} | {self.now})
        since = data.draw(st.sampled_from(times), label="since")
        found = self.tier.unused_since(since)
        assert len(found) == len(set(found))
        assert set(found) == self.model.unused_since(since)

    @rule(in_child=st.booleans())
    def fork(self, in_child):
        self.tier.before_fork()
        self.tier.after_fork(in_child)
        if in_child:
            for key in list(self.model.writing):
                self.model.discard(key)

    # --- interrupts -----------------------------------------------------------------------------------------------

    @rule(data=st.data(), call=CALLS, at=st.integers(0, 90))
    def interrupt(self, data, call, at):
        before = set(self.model.blocks)
        if call.startswith("put"):
            block = self.draw_block(data)
            before.add(block.id.key)
            self.run_interrupted(at, lambda: self.tier.put(block, writing=call != "put"))
        elif call == "close" and self.readers:
            reader = self.readers[-1]
            self.run_interrupted(at % 3, reader.close)
            self.end_the_lease_of(reader)
        elif call == "shrink":
            self.run_interrupted(at, lambda: self.tier.shrink(self.model.nbytes // 2))
        elif call == "touch":
            self.run_interrupted(at, lambda: self.tier.touch(sorted(before)[:3], {}))
        elif call == "unused":
            self.run_interrupted(at, lambda: self.tier.unused_since(self.now))
        elif call == "discard":
            key = self.draw_key(data)
            self.run_interrupted(at, lambda: self.tier.discard(key))
        else:
            self.run_interrupted(at, self.tier.expire)
        assert set(self.tier._blocks) <= before
        self.take_over()

    def run_interrupted(self, at, call):
        with contextlib.suppress(KeyboardInterrupt), InterruptAtLine(at, FILES):
            call()

    def take_over(self):
        """Copy the tier's blocks and their records to the model, but nothing that the tier derives from them."""
        here = sorted(self.tier._blocks.values(), key=lambda resident: resident.number)
        self.model.blocks = {
            each.block.id.key: Known(each.block, each.usage, each.standing, each.used_at, each.hits) for each in here
        }
        self.model.state = self.tier._valuation.state
        self.model.ghosts = dict(self.tier._valuation.ghosts)
        self.model.counts = Counter(self.tier.counts)
        self.model.writing = set(self.tier._writing)

    # --- invariants -----------------------------------------------------------------------------------------------

    @invariant()
    def both_hold_the_same(self):
        if not hasattr(self, "tier"):
            return
        assert self.tier.nbytes == self.model.nbytes <= self.model.budget_bytes
        assert set(self.tier._blocks) == set(self.model.blocks)
        assert set(self.tier.entries()) == self.model.entries()
        assert set(self.tier._writing) == self.model.writing <= set(self.model.blocks)
        assert self.tier.counts == self.model.counts
        assert set(self.tier._valuation.ghosts) == set(self.model.ghosts)
        assert self.tier._valuation.state == self.model.state
        held = {key for key, n in self.model.leases.items() if n} | self.model.writing
        assert {key for key in (*self.made, *held) if key in self.tier.leases} == held

    @rule(data=st.data(), tokens=TOKENS, windows=st.booleans())
    def both_find_the_same(self, data, tokens, windows):
        parent = data.draw(st.sampled_from([ROOT, *sorted(self.made)]), label="parent")
        found = self.tier.nearest(parent, ids(*tokens), windows=windows)
        assert [common_run(block.tokens, ids(*tokens)) for block in found[:1]] == [
            run for run in [self.model.longest_run(parent, ids(*tokens), windows)] if run is not None
        ]
        assert all(block.parent == parent and self.model.is_found(block.key) for block in found)
        assert all(block.is_window == windows for block in found)
        tails = [block.key for block in self.tier.tails(parent, ids(*tokens))]
        assert len(tails) == len(set(tails))
        assert set(tails) == self.model.tails(parent, ids(*tokens))


TestRamMachine = RamMachine.TestCase
TestRamMachine.settings = settings(stateful_step_count=40)
