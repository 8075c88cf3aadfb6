"""Adaptive: learns to balance recency against frequency."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kvtier.store.eviction.base import PolicyState, Standing, Usage

_ONCE, _AGAIN = 0, 1


def came_back(usage: Usage) -> bool:
    """Return whether several turns used a block."""
    return usage.uses > 1


class Adaptive:
    """Balances recency against frequency, by learning from blocks that were evicted too early. The default.

    Blocks that one turn used wait in one queue, blocks that several turns used in the other.

    Within a queue the order is that of last use, shifted by the cost of computing the block again. The token after
    ``p`` others takes ``2·params + 4·layers·width·p`` operations: the matrix products, and attention, which is linear
    in ``p`` for one token and so quadratic for a prompt. That is ``1 + p / P`` times the cost of the first token, where
    ``P = params / (2·layers·width)`` is 4,000 tokens in a model of 135 million parameters, 30,000 in one of 8 billion
    and 53,000 in one of 70 billion; a tier does not know the model and takes 32,768. A block that costs twice as much
    by that measure stays longer, by half of the recent average of turns from the last use of a block to its eviction.

    The size in bytes does not count. Within a model it is proportional to tokens, as the cost is; and per byte of K and
    V, a larger model takes more to compute, not less.

    The lead of the queue of blocks that several turns used is learnt, as in ARC (Megiddo and Modha, FAST 2003): each
    returning ghost moves it in favour of its own queue; the smaller the share of that queue in evictions, the larger
    the step.

    It learns three numbers:

    - ``favour``: the logarithm of one more than that lead;
    - ``came_back_share``: the share of blocks that several turns used, among recently evicted blocks;
    - ``stay``: the recent average of turns from the last use of a block to its eviction.
    """

    name = "adaptive/2"
    queues = 2
    initial: Mapping[str, float] = {"favour": math.log(300.0), "came_back_share": 0.5, "stay": 0.0}
    REFERENCE_TOKENS = 32768
    COST_WEIGHT = 0.5
    STEP = 0.003
    """How far one ghost moves the logarithm of the lead."""
    MOST_STEPS = 20.0
    SHARE_RATE = 0.002
    STAY_RATE = 0.005

    def is_sound(self, state: PolicyState) -> bool:
        """Return whether no number is negative, and the share is at most 1."""
        return min(state.learnt.values()) >= 0 and state.learnt["came_back_share"] <= 1

    def standing(self, usage: Usage, state: PolicyState) -> Standing:
        """Rank a block by its last turn; a higher cost ranks it later."""
        middle = usage.depth_tokens + usage.tokens / 2
        cost = self.COST_WEIGHT * state.learnt["stay"] * math.log2(1.0 + middle / self.REFERENCE_TOKENS)
        return Standing(_AGAIN if came_back(usage) else _ONCE, state.clock + cost)

    def lead(self, queue: int, state: PolicyState) -> float:
        """Return by how many turns blocks that several turns used stay longer."""
        return min(math.expm1(state.learnt["favour"]), float(state.clock)) if queue == _AGAIN else 0.0

    def evicted(self, usage: Usage, state: PolicyState) -> PolicyState:
        """Learn how long the block stayed, and whether several turns used it."""
        share, stay = state.learnt["came_back_share"], state.learnt["stay"]
        return state.learn(
            came_back_share=share + self.SHARE_RATE * (came_back(usage) - share),
            stay=stay + self.STAY_RATE * (max(0, state.clock - usage.last_use) - stay),
        )

    def returned(self, ghost: Usage, state: PolicyState) -> PolicyState:
        """Move the lead in favour of the queue of the ghost."""
        share = state.learnt["came_back_share"]
        step = self.STEP * min(self.MOST_STEPS, 1.0 / max(share if came_back(ghost) else 1.0 - share, 1e-9))
        favour = state.learnt["favour"] + (step if came_back(ghost) else -step)
        return state.learn(favour=min(max(favour, 0.0), math.log1p(state.clock)))
