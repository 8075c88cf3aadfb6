"""Adaptive: learns to balance recency against frequency."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kvtier.store.eviction.base import PolicyState, Standing, Usage

_ONCE, _AGAIN = 0, 1
_LARGEST_LOGARITHM = 200.0


def came_back(usage: Usage) -> bool:
    """Return whether several turns used a block."""
    return usage.uses > 1


class Adaptive:
    """Balances recency against frequency, by learning from blocks that were evicted too early. The default.

    Blocks that one turn used wait in one queue, blocks that several turns used in the other.

    Within a queue the order is that of last use, shifted by what a block saves: the seconds that loading it takes less
    than computing its tokens, as measured, for each byte that it takes. A block that saves twice as much a byte as is
    usual stays longer, by half of the recent average of turns from the last use of a block to its eviction; one that
    saves half as much goes as much earlier. Usual is what evicted blocks saved in the geometric mean: the first ones in
    equal parts, later ones with a fixed weight. The shift is bounded, so that no estimate keeps a block for ever.

    Where nothing was measured, a block counts as a usual one, and by its depth in the chain. The token after ``p``
    others takes ``2·params + 4·layers·width·p`` operations: the matrix products, and attention, which is linear in
    ``p`` for one token and so quadratic for a prompt. That is ``1 + p / P`` times the cost of the first token, where
    ``P = params / (2·layers·width)`` is 4,000 tokens in a model of 135 million parameters, 30,000 in one of 8 billion
    and 53,000 in one of 70 billion; of a model that was not measured, 32,768 is taken. The size in bytes does not count
    then: within a model it is proportional to tokens, as the cost is.

    The lead of the queue of blocks that several turns used is learnt, as in ARC (Megiddo and Modha, FAST 2003): each
    returning ghost moves it in favour of its own queue; the smaller the share of that queue in evictions, the larger
    the step.

    It learns five numbers:

    - ``favour``: the logarithm of one more than that lead;
    - ``came_back_share``: the share of blocks that several turns used, among recently evicted blocks;
    - ``stay``: the recent average of turns from the last use of a block to its eviction;
    - ``usual``: the recent average of the binary logarithm of seconds saved a byte, of evicted blocks;
    - ``weighed``: how many evicted blocks that average stands for.
    """

    name = "adaptive/3"
    queues = 2
    initial: Mapping[str, float] = {
        "favour": math.log(300.0),
        "came_back_share": 0.5,
        "stay": 0.0,
        "usual": 0.0,
        "weighed": 0.0,
    }
    REFERENCE_TOKENS = 32768
    COST_WEIGHT = 0.5
    MOST_DOUBLINGS = 4.0
    """The most that a measured cost counts for, either way."""
    USUAL_BLOCKS = 500.0
    """How many evicted blocks ``usual`` stands for at most."""
    STEP = 0.003
    """How far one ghost moves the logarithm of the lead."""
    MOST_STEPS = 20.0
    SHARE_RATE = 0.002
    STAY_RATE = 0.005

    def is_sound(self, state: PolicyState) -> bool:
        """Return whether no number is negative but ``usual``, the share is at most 1, and the counts are bounded."""
        learnt = state.learnt
        positive = [number for name, number in learnt.items() if name != "usual"]
        is_usual = abs(learnt["usual"]) <= _LARGEST_LOGARITHM and learnt["weighed"] <= self.USUAL_BLOCKS
        return min(positive) >= 0 and learnt["came_back_share"] <= 1 and is_usual

    def standing(self, usage: Usage, state: PolicyState) -> Standing:
        """Rank a block by its last turn; the more it saves, the later."""
        shift = self.COST_WEIGHT * state.learnt["stay"] * self._doublings(usage, state)
        return Standing(_AGAIN if came_back(usage) else _ONCE, state.clock + shift)

    def _doublings(self, usage: Usage, state: PolicyState) -> float:
        """Return the binary logarithm of how many times as much as usual a block is worth."""
        saved = _saved(usage)
        if saved is not None and state.learnt["weighed"]:
            return min(max(saved - state.learnt["usual"], -self.MOST_DOUBLINGS), self.MOST_DOUBLINGS)
        middle = usage.depth_tokens + usage.tokens / 2
        return math.log2(1.0 + middle / self.REFERENCE_TOKENS)

    def lead(self, queue: int, state: PolicyState) -> float:
        """Return by how many turns blocks that several turns used stay longer."""
        return min(math.expm1(state.learnt["favour"]), float(state.clock)) if queue == _AGAIN else 0.0

    def evicted(self, usage: Usage, state: PolicyState) -> PolicyState:
        """Learn how long the block stayed, whether several turns used it, and what it saved."""
        share, stay = state.learnt["came_back_share"], state.learnt["stay"]
        usual, weighed = state.learnt["usual"], state.learnt["weighed"]
        saved = _saved(usage)
        if saved is not None:
            weighed = min(weighed + 1, self.USUAL_BLOCKS)
            usual += (saved - usual) / weighed
        return state.learn(
            came_back_share=share + self.SHARE_RATE * (came_back(usage) - share),
            stay=stay + self.STAY_RATE * (max(0, state.clock - usage.last_use) - stay),
            usual=usual,
            weighed=weighed,
        )

    def returned(self, ghost: Usage, state: PolicyState) -> PolicyState:
        """Move the lead in favour of the queue of the ghost."""
        share = state.learnt["came_back_share"]
        step = self.STEP * min(self.MOST_STEPS, 1.0 / max(share if came_back(ghost) else 1.0 - share, 1e-9))
        favour = state.learnt["favour"] + (step if came_back(ghost) else -step)
        return state.learn(favour=min(max(favour, 0.0), math.log1p(state.clock)))


def _saved(usage: Usage) -> float | None:
    """Return the binary logarithm of the seconds that a block saves a byte; None where nothing is known of it."""
    rate = usage.saved_seconds / usage.nbytes if usage.nbytes > 0 else 0.0
    if not 0 < rate < math.inf:
        return None
    return min(max(math.log2(rate), -_LARGEST_LOGARITHM), _LARGEST_LOGARITHM)
