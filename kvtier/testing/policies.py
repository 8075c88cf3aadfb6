"""PolicyChecks: what every eviction policy must do, as a class to subclass in a test."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from kvtier.kv.page import Page
from kvtier.store.block import Block
from kvtier.store.chain import BlockId
from kvtier.store.eviction.base import (
    MOST_NOTE_CHARACTERS,
    MOST_QUEUES,
    EvictionPolicy,
    PolicyState,
    Standing,
    Usage,
    fresh_state,
    state_from_text,
    state_to_text,
)
from kvtier.store.tiers.disk.catalog.blocks import Catalog, Prepared
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.store.tiers.host.tier import HostTier

_ROOT = "00" * 32
_LONG_AGO = 10**12
_Path = tuple[int, ...]


class PolicyChecks:
    """Subclass it as ``Test…`` and define the fixture ``policy``, which returns a policy."""

    def test_it_says_what_it_is(self, policy: EvictionPolicy) -> None:
        """A name, a number of queues, and finite numbers to begin with that it accepts itself."""
        assert policy.name
        assert isinstance(policy.name, str)
        assert 1 <= policy.queues <= MOST_QUEUES
        assert all(math.isfinite(number) for number in policy.initial.values())
        assert policy.is_sound(fresh_state(policy))

    def test_all_numbers_stay_usable(self, policy: EvictionPolicy) -> None:
        """In a new store, and after 10**12 turns: finite, and what it has learnt survives being written down."""
        for clock in (0, _LONG_AGO):
            for usage, state in _history(policy, clock):
                standing = policy.standing(usage, state)
                assert 0 <= standing.queue < policy.queues
                assert math.isfinite(standing.priority)
                assert isinstance(standing.note, str)
                assert len(standing.note) <= MOST_NOTE_CHARACTERS
                for queue in range(policy.queues):
                    assert math.isfinite(policy.lead(queue, state))
                assert state.learnt.keys() == policy.initial.keys()
                assert state_from_text(policy, state_to_text(policy, state)) == state

    def test_a_later_use_is_never_worth_less(self, policy: EvictionPolicy) -> None:
        """A block that is used once more goes no earlier than before, if nothing was learnt in between."""
        for usage, state in _history(policy, 0):
            before = policy.standing(usage, state)
            later = state.tick()
            after = policy.standing(replace(usage, note=before.note).used(later.clock), later)
            value = before.priority + policy.lead(before.queue, later)
            assert after.priority + policy.lead(after.queue, later) >= value

    def test_it_has_no_side_effects(self, policy: EvictionPolicy) -> None:
        """The same question has the same answer, whatever was asked in between."""
        history = list(_history(policy, 0))
        first = [_answers(policy, usage, state) for usage, state in history]
        assert [_answers(policy, usage, state) for usage, state in reversed(history)] == first[::-1]

    def test_ram_evicts_in_its_order(self, policy: EvictionPolicy) -> None:
        """Leaf by leaf, always the one of the lowest value; ghosts that return are told to the policy."""
        tier = HostTier(10**6, policy, lambda: 0.0, saved_seconds=_saved_seconds)

        def evict() -> str:
            (gone,) = tier.shrink(tier.nbytes - 1)
            return gone.key

        _play(policy, tier.put, lambda keys: tier.touch(keys, {}), evict)

    def test_files_are_evicted_in_its_order(self, policy: EvictionPolicy) -> None:
        """The same for the rows of files."""
        with closing(Database(None)) as database:
            catalog = Catalog(database, policy, lambda: 0.0, _saved_seconds)

            def put(block: Block) -> None:
                assert catalog.prepare_store(block.id, 1, 10**6, "owner") is Prepared.RESERVED
                catalog.complete_store(block.id.key, "owner")

            def evict() -> str:
                (gone,) = catalog.evict(1, "owner", "", lambda place: False, at_most=1)
                catalog.complete_delete([gone.key])
                return gone.key

            _play(policy, put, lambda keys: catalog.touch(keys, {}), evict)


def _history(policy: EvictionPolicy, clock: int) -> Iterator[tuple[Usage, PolicyState]]:
    """Yield blocks with their past, and what the policy has learnt meanwhile, drawn from a fixed seed."""
    drawn = random.Random(7)
    state = fresh_state(policy, clock)
    for _ in range(50):
        usage = Usage(0, state.clock, drawn.randint(1, 4096), drawn.randint(0, 10**6), drawn.randint(1, 10**9))
        usage = replace(usage, saved_seconds=drawn.choice([0.0, 10 ** drawn.uniform(-300, 300)]))
        for _ in range(drawn.randint(0, 4)):
            standing = policy.standing(usage, state)
            for _ in range(drawn.choice([1, 2, 100])):
                state = state.tick()
            usage = replace(usage, note=standing.note).used(state.clock)
        yield usage, state
        if drawn.random() < 0.5:
            state = policy.evicted(usage, state)
        if drawn.random() < 0.3:
            state = policy.returned(usage, state)


def _saved_seconds(root: str, tokens: int, depth_tokens: int, nbytes: int) -> float:
    """Return 1 to 3 by depth, and 0 as for a block of which nothing is known at another."""
    return float(depth_tokens % 4)


def _answers(policy: EvictionPolicy, usage: Usage, state: PolicyState) -> tuple[object, ...]:
    leads = tuple(policy.lead(queue, state) for queue in range(policy.queues))
    return policy.standing(usage, state), leads, policy.evicted(usage, state), policy.returned(usage, state)


def _block(path: _Path) -> Block:
    """Return a block of one token, found by the tokens on the way to it."""
    parent = _ROOT
    for token in path:
        identity = BlockId.of(_ROOT, parent, np.array([token], dtype=np.int64))
        parent = identity.key
    page = torch.zeros(1, 1, 1, device="cpu")
    return Block(identity, (Page(page, page),), len(path) - 1)


def _play(
    policy: EvictionPolicy,
    put: Callable[[Block], object],
    touch: Callable[[list[str]], None],
    evict: Callable[[], str],
) -> None:
    """Let turns put, use and evict blocks, and compare each eviction with a look at all leaves."""
    drawn = random.Random(3)
    state = fresh_state(policy)
    known: dict[_Path, tuple[Usage, Standing]] = {}
    gone_before: set[_Path] = set()
    ghosts: dict[_Path, Usage] = {}  # the last one: every tier remembers as many as it has blocks, or more

    def rank(path: _Path, usage: Usage) -> None:
        standing = policy.standing(usage, state)
        known[path] = replace(usage, note=standing.note), standing

    for _ in range(40):
        path = tuple(drawn.randint(0, 2) for _ in range(drawn.randint(1, 4)))
        chain = [path[:end] for end in range(1, len(path) + 1)]
        if any(each in gone_before and each not in known and each not in ghosts for each in chain):
            continue
        for each in chain:
            if each not in known:
                put(_block(each))
                depth = len(each) - 1
                usage = Usage(0, state.clock, 1, depth, 1, saved_seconds=_saved_seconds(_ROOT, 1, depth, 1))
                if each in ghosts:
                    ghost = ghosts.pop(each)
                    state = policy.returned(ghost, state)
                    usage = replace(ghost, last_use=state.clock)
                rank(each, usage)
        touch([_block(each).id.key for each in chain])
        state = state.tick()
        for each in chain:
            rank(each, known[each][0].used(state.clock))
        while known and drawn.random() < 0.5:
            values = {
                each: standing.priority + policy.lead(standing.queue, state)
                for each, (_, standing) in known.items()
                if not any(other[:-1] == each for other in known)
            }
            key = evict()
            gone = next(each for each in known if _block(each).id.key == key)
            assert values[gone] == min(values.values())
            usage = known.pop(gone)[0]
            state = policy.evicted(usage, state)
            ghosts = {gone: usage}
            gone_before.add(gone)
