"""Eviction policies: least recently used, and one that learns between recency and frequency."""

from __future__ import annotations

import math
from dataclasses import replace

from kvtier.store.eviction.base import PolicyState, Usage


class LeastRecentlyUsed:
    """The block goes first that was not used for longest."""

    name = "least-recently-used/1"

    def priority(self, usage: Usage, state: PolicyState) -> float:
        """Return when it was used."""
        return float(state.clock)

    def lead(self, state: PolicyState) -> float:
        """Return none."""
        return 0.0

    def evicted(self, usage: Usage, priority: float, state: PolicyState) -> PolicyState:
        """Change nothing."""
        return state

    def returned(self, ghost: Usage, state: PolicyState) -> PolicyState:
        """Change nothing."""
        return state


class Adaptive:
    """Balances recency against frequency by what turns out to have been evicted too early. The default.

    Within a queue the order is that of last use, moved by what a block costs to compute again. The token after ``p``
    others takes ``2·params + 4·layers·width·p`` operations: the matrix products, and attention, which is linear in
    ``p`` for one token and so quadratic for a prompt. That is ``1 + p / P`` times what the first token takes, where
    ``P = params / (2·layers·width)`` is 4,000 tokens in a model of 135 million parameters, 30,000 in one of 8 billion
    and 53,000 in one of 70 billion; a tier does not know the model and takes 32,768. A block twice as dear by that
    measure stays longer, by half of the turns that blocks lately had from their last use to their eviction.

    Bytes are no reason to go first. Within a model they are proportional to tokens, as the cost is; and per byte of K
    and V, a larger model takes more to compute, not less.

    The lead of blocks that came back is learnt, as in ARC (Megiddo and Modha, FAST 2003): each ghost that returns moves
    it in favour of its kind, the more the smaller the share of its kind among the evicted is.
    """

    name = "adaptive/1"
    REFERENCE_TOKENS = 32768
    COST_WEIGHT = 0.5
    STEP = 0.003
    """How far one ghost moves the logarithm of the lead."""
    MOST_STEPS = 20.0
    SHARE_RATE = 0.002
    STAY_RATE = 0.005

    def priority(self, usage: Usage, state: PolicyState) -> float:
        """Return when it was used, later by what it would cost."""
        middle = usage.depth_tokens + usage.tokens / 2
        return state.clock + self.COST_WEIGHT * state.stay * math.log2(1.0 + middle / self.REFERENCE_TOKENS)

    def lead(self, state: PolicyState) -> float:
        """Return the turns by which a block that came back outstays one that did not."""
        return min(math.expm1(state.favour), float(state.clock))

    def evicted(self, usage: Usage, priority: float, state: PolicyState) -> PolicyState:
        """Note how long it stayed, and of which kind it was."""
        came_back_share = state.came_back_share + self.SHARE_RATE * (usage.came_back - state.came_back_share)
        stay = state.stay + self.STAY_RATE * (max(0, state.clock - usage.last_use) - state.stay)
        return replace(state, came_back_share=came_back_share, stay=stay)

    def returned(self, ghost: Usage, state: PolicyState) -> PolicyState:
        """Move the lead in favour of its kind."""
        share = state.came_back_share if ghost.came_back else 1.0 - state.came_back_share
        step = self.STEP * min(self.MOST_STEPS, 1.0 / max(share, 1e-9))
        favour = state.favour + (step if ghost.came_back else -step)
        return replace(state, favour=min(max(favour, 0.0), math.log1p(state.clock)))
