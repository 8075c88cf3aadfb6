"""The seam of eviction: which block goes first. Pure decisions, no I/O.

Only a *leaf* can go, a block that no other follows: without its parent, a block could never be found. A policy gives
each block a **standing** when it is put or used: one of a few queues, and a priority within it. A tier stores the
standing beside the block, so that an index finds the leaf of the lowest priority in each queue. When a block must go,
each queue has a **lead**, a number that is added to the priorities of that queue. The lead is not stored, so a new lead
holds for all blocks of the queue at once.

A tier counts turns on a clock, and keeps what the policy has learnt: a few numbers by name, which processes that share
a folder share too. It remembers blocks that were evicted lately as *ghosts*, no more of them than blocks it has room
for. A ghost that is put again was evicted too early, which is how a policy learns; its uses and its note go on.

All numbers stay finite: 64-bit floats tell 2**53 turns apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from kvtier.errors import ConfigurationError

LONGEST_CLOCK = 2**53
MOST_QUEUES = 16
MOST_NOTE_CHARACTERS = 256
_LARGEST = 1e15

SavedSeconds = Callable[[str, int, int, int], float]
"""``(root, tokens, depth_tokens, nbytes)`` → ``Usage.saved_seconds`` of such a block.
Tiers ask it while they hold locks of their own: it takes constant time and no lock, and does no I/O."""


def nothing_known(root: str, tokens: int, depth_tokens: int, nbytes: int) -> float:
    """Return 0: nothing was measured."""
    return 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tier remembers of a block.

    Attributes:
        uses: turns that used it; 0 in the turn that puts it.
        last_use: the clock at the last of these turns; of a ghost, this may be the clock at its eviction.
        tokens: its token ids.
        depth_tokens: tokens before it in its chain.
        nbytes: what it takes.
        note: what the policy noted of it last, in its own words; empty when it is new.
        saved_seconds: how much sooner a turn is ready that loads it, instead of computing its tokens, as measured on
            this machine; 0 where nothing is known of that. Blocks that cost more to load than to compute have a little
            more than 0.
    """

    uses: int
    last_use: int
    tokens: int
    depth_tokens: int
    nbytes: int
    note: str = ""
    saved_seconds: float = 0.0

    def used(self, clock: int) -> Usage:
        """Return the same after one more turn."""
        return replace(self, uses=self.uses + 1, last_use=clock)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a policy ranks a block. A tier stores it beside the block.

    Attributes:
        queue: which queue the block waits in, from 0.
        priority: within the queue, the lowest goes first. Finite.
        note: what the policy wants to read again in ``Usage.note``, of at most ``MOST_NOTE_CHARACTERS``.
    """

    queue: int
    priority: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What a tier remembers of all blocks together.

    Attributes:
        clock: turns so far.
        learnt: what the policy has learnt. Its names are those of ``EvictionPolicy.initial``.
    """

    clock: int
    learnt: Mapping[str, float]

    def tick(self) -> PolicyState:
        """Return the same one turn later."""
        return replace(self, clock=self.clock + 1)

    def learn(self, **numbers: float) -> PolicyState:
        """Return the same with other numbers."""
        return replace(self, learnt={**self.learnt, **numbers})


class EvictionPolicy(Protocol):
    """Ranks blocks, in constant time and without side effects. The leaf of the lowest value goes first.

    The value of a block is its priority, plus the lead of its queue.

    Attributes:
        name: what it is called, and the version of what it learns and notes: those of another name begin anew.
        queues: how many queues it uses, 1 to ``MOST_QUEUES``.
        initial: what it knows before it has learnt anything: finite numbers by name.
    """

    name: str
    queues: int
    initial: Mapping[str, float]

    def is_sound(self, state: PolicyState) -> bool:
        """Return whether ``learnt``, finite numbers by the right names, is what this policy could have learnt."""

    def standing(self, usage: Usage, state: PolicyState) -> Standing:
        """Rank a block that was just put or used."""

    def lead(self, queue: int, state: PolicyState) -> float:
        """Return what is added to the priorities of ``queue``. Finite."""

    def evicted(self, usage: Usage, state: PolicyState) -> PolicyState:
        """Return the state after an eviction."""

    def returned(self, ghost: Usage, state: PolicyState) -> PolicyState:
        """Return the state after a block is put again that was evicted lately; ``ghost`` is what it was then."""


def fresh_state(policy: EvictionPolicy, clock: int = 0) -> PolicyState:
    """Return the state of a ``policy`` that has learnt nothing."""
    return PolicyState(clock, dict(policy.initial))


def state_to_text(policy: EvictionPolicy, state: PolicyState) -> str:
    """Write down a state of ``policy``."""
    return json.dumps({"policy": policy.name, "clock": state.clock, "learnt": dict(state.learnt)})


def state_from_text(policy: EvictionPolicy, text: str) -> PolicyState | None:
    """Read what ``state_to_text`` wrote for the same policy; None of anything else."""
    try:
        values = json.loads(text)
        if values.pop("policy") != policy.name or values.keys() != {"clock", "learnt"}:
            return None
        clock, learnt = values["clock"], values["learnt"]
        is_sound = (
            type(clock) is int
            and 0 <= clock <= LONGEST_CLOCK
            and learnt.keys() == policy.initial.keys()
            and all(type(number) in (int, float) and abs(number) < _LARGEST for number in learnt.values())  # not NaN
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    state = PolicyState(clock, learnt) if is_sound else None
    return state if state is not None and policy.is_sound(state) else None


def queue_among(policy: EvictionPolicy, queue: int) -> int:
    """Return the queue of ``policy`` that answers for a stored ``queue``, which another policy may have chosen."""
    return min(max(queue, 0), policy.queues - 1)


def check_policy(policy: EvictionPolicy) -> EvictionPolicy:
    """Return ``policy`` if a store can ask it.

    Raises:
        ConfigurationError: a part of it is missing, or has a value that tiers cannot keep.
    """
    kind = type(policy).__name__
    if not isinstance(getattr(policy, "name", None), str) or not policy.name:
        raise ConfigurationError(f"policy={kind} has no name; see kvtier.store.eviction.base.")
    missing = [name for name in _METHODS if not callable(getattr(policy, name, None))]
    if missing:
        raise ConfigurationError(f"policy={kind} has no method {missing[0]}; see kvtier.store.eviction.base.")
    queues, initial = getattr(policy, "queues", None), getattr(policy, "initial", None)
    if type(queues) is not int or not 1 <= queues <= MOST_QUEUES:
        raise ConfigurationError(f"policy={kind} has queues={queues!r:.40}; it must be 1 to {MOST_QUEUES}.")
    are_numbers = isinstance(initial, Mapping) and all(type(number) in (int, float) for number in initial.values())
    if not are_numbers or state_from_text(policy, state_to_text(policy, fresh_state(policy))) is None:
        raise ConfigurationError(f"policy={kind} has initial={initial!r:.80}; it must be finite numbers by name.")
    return policy


_METHODS = ("is_sound", "standing", "lead", "evicted", "returned")
