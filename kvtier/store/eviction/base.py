"""Who goes first: pure decisions, no I/O.

The story. Only a *leaf* can go, a block that no other follows, or what follows it could never be found. Leaves wait in
two queues: those that one turn used, and those that came back, which several turns used. Within a queue, the block goes
first whose **priority** is lowest: a number that is computed when the block is put or used, and stored beside it, so
that a tier finds the lowest with an index. Between the two queues, blocks that came back have a **lead**: a number of
turns that is computed when somebody must go. Because the lead is not part of what is stored, a new lead holds for all
blocks at once.

A tier gives each block its ``Usage`` and all of them one ``PolicyState``, which processes that share a folder share
too. It remembers what was evicted lately as *ghosts*, no more of them than blocks it has room for: a ghost that is put
again was evicted too early, which is how a policy learns. Its uses go on counting.

All numbers stay finite for as long as turns are counted: priorities grow by one a turn, and 64-bit floats are exact up
to 2**53 of them; the lead never exceeds the number of turns.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Protocol

LONGEST_CLOCK = 2**53
_LARGEST = 1e15


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tier remembers of a block.

    Attributes:
        uses: turns that used it; 0 in the turn that puts it.
        last_use: the clock of the tier at the last of them.
        tokens: its token ids.
        depth_tokens: tokens before it in its chain.
        nbytes: what it takes.
    """

    uses: int
    last_use: int
    tokens: int
    depth_tokens: int
    nbytes: int

    @property
    def came_back(self) -> bool:
        """Whether several turns used it."""
        return self.uses > 1

    def used(self, state: PolicyState) -> Usage:
        """Return the same after one more turn."""
        return replace(self, uses=self.uses + 1, last_use=state.clock)


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What a tier remembers of all blocks together.

    Attributes:
        clock: turns so far.
        favour: what a policy has learnt about blocks that came back: the logarithm of one more than their lead.
        came_back_share: of the blocks that were evicted lately, those that had come back.
        stay: turns from the last use of a block to its eviction, lately.
    """

    clock: int = 0
    favour: float = math.log(300.0)
    came_back_share: float = 0.5
    stay: float = 0.0

    def tick(self) -> PolicyState:
        """Return the same one turn later."""
        return replace(self, clock=self.clock + 1)

    @classmethod
    def from_text(cls, text: str, policy: str) -> PolicyState | None:
        """Read what ``to_text`` wrote for the ``policy`` of that name; None of anything else."""
        try:
            values = json.loads(text)
            if values.pop("policy") != policy or values.keys() != {each.name for each in fields(cls)}:
                return None
            is_sound = (
                type(values["clock"]) is int
                and 0 <= values["clock"] <= LONGEST_CLOCK
                and 0 <= values["came_back_share"] <= 1
                and all(0 <= values[name] < _LARGEST for name in ("favour", "stay"))  # NaN is not
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return cls(**values) if is_sound else None

    def to_text(self, policy: str) -> str:
        """Write it down for the ``policy`` of that name: what the numbers mean is that policy's."""
        return json.dumps({"policy": policy, **asdict(self)})


class EvictionPolicy(Protocol):
    """Values blocks, in constant time and without side effects. The leaf of the lowest value goes first.

    The value of a block is its priority, plus the lead if it came back.

    Attributes:
        name: what it is called, and the version of what its state means: a state of another name begins anew.
    """

    name: str

    def priority(self, usage: Usage, state: PolicyState) -> float:
        """Return what to store with a block that was just put or used."""

    def lead(self, state: PolicyState) -> float:
        """Return how much more all blocks are worth that came back; at least 0."""

    def evicted(self, usage: Usage, priority: float, state: PolicyState) -> PolicyState:
        """Return the state after an eviction."""

    def returned(self, ghost: Usage, state: PolicyState) -> PolicyState:
        """Return the state after a block is put again that was evicted lately; ``ghost`` is what it was then."""
