"""Costs by which a turn is planned: what it takes to compute tokens, and to load them.

They are constants, in the units that their names say. Eviction has two more, in ``store/eviction/adaptive.py``: the
store knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """What a plan weighs against each other.

    Attributes:
        single_pass_tokens: a forward pass of one token takes about as long as so many tokens of a long prefill.
        checkpoint_worth_tokens: what a checkpoint must spare the next prompt that leaves this one at the same place: it
            costs one more forward pass.
        checkpoint_spacing_tokens: how far apart checkpoints of a long prompt are: an edit then costs half of it on
            average (``benchmarks/checkpoints.py``).
        overlap_bytes_per_second: pages that come faster than this are waited for before the first layer computes.
            Where the threads that compute leave no core to those that read, each slows the other down by more than the
            overlap gains; pages of a slow drive do not come so fast.
    """

    single_pass_tokens: int = 4
    checkpoint_worth_tokens: int = 16
    checkpoint_spacing_tokens: int = 2048
    overlap_bytes_per_second: float = 1e9


COSTS = Costs()
