"""Who goes first: pure decisions, no I/O."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tier remembers of a block.

    Attributes:
        uses: turns that used it.
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

    def used(self, state: PolicyState) -> Usage:
        """Return the same after one more turn."""
        return replace(self, uses=self.uses + 1, last_use=state.clock)


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What a tier remembers of all blocks together.

    Attributes:
        clock: turns so far.
    """

    clock: int = 0

    def tick(self) -> PolicyState:
        """Return the same one turn later."""
        return replace(self, clock=self.clock + 1)

    @classmethod
    def from_text(cls, text: str) -> PolicyState:
        """Read what ``to_text`` wrote."""
        return cls(**json.loads(text)) if text else cls()

    def to_text(self) -> str:
        """Write it down."""
        return json.dumps(asdict(self))


class EvictionPolicy(Protocol):
    """Values blocks. The leaf with the lowest priority goes first."""

    def priority(self, usage: Usage, state: PolicyState) -> float:
        """Return what a block is worth that was just put or used."""

    def evicted(self, usage: Usage, priority: float, state: PolicyState) -> PolicyState:
        """Return the state after an eviction."""

    def returned(self, ghost: Usage, state: PolicyState) -> PolicyState:
        """Return the state after a block is put again that was evicted lately."""


class LeastRecentlyUsed:
    """The block goes first that was not used for longest."""

    def priority(self, usage: Usage, state: PolicyState) -> float:
        """Return when it was used."""
        return float(state.clock)

    def evicted(self, usage: Usage, priority: float, state: PolicyState) -> PolicyState:
        """Change nothing."""
        return state

    def returned(self, ghost: Usage, state: PolicyState) -> PolicyState:
        """Change nothing."""
        return state
