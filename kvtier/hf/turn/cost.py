"""Constants for planning a turn, with units in their names.

What computing and loading cost in seconds is measured: ``kvtier/costs``. Eviction has constants of its own in
``store/eviction/adaptive.py``, for what was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs that a plan compares.

    Attributes:
        single_pass_tokens: cost of a forward pass of one token, in tokens of a long prefill.
        checkpoint_worth_tokens: tokens that a checkpoint must save the next prompt that branches at the same place: it
            costs one more forward pass.
        checkpoint_spacing_tokens: distance between checkpoints of a long prompt: an edit recomputes half of it on
            average (``benchmarks/checkpoints.py``).
        window_spacing_tokens: least distance between the places in a long prompt at which K and V of sliding layers are
            kept. Of shorter prompts, all are kept.
        window_spacing_windows: the same distance in sliding windows: at each place, about one window is kept
            (``benchmarks/sliding.py``).
        window_margin_tokens: tokens before the end of a prompt and of a turn, from each of which a later prompt can go
            on: chat templates rewrite the end, and questions follow a document.
        overlap_bytes_per_second: pages that load faster than this are waited for before the first layer computes. When
            compute threads leave no core to reading threads, each slows the other down by more than the overlap
            gains. Slow drives do not reach this rate.
        other_way_share: a prefix is computed again, or loaded in part, if that takes less than this share of the time
            of loading it.
        both_share: the same for computing the front while the rest loads, in shorter and so less efficient passes.
        asking_share: tiers below are asked if to ask and to load could take less than this share of computing.
        watched_load_seconds: a load that is expected to take longer is given up where computing overtakes it.
        watched_load_times: a load, or a wait for the rest of it, may take so many times what is expected.
        least_patience_seconds: a load that cannot be computed around is given up after so long, or as long as computing
            would take.
        shortest_chunk_tokens: fewer tokens are not computed while others load.
        longest_chunk_tokens: after so many, what has arrived meanwhile is looked at again.
    """

    single_pass_tokens: int = 4
    checkpoint_worth_tokens: int = 16
    checkpoint_spacing_tokens: int = 2048
    window_spacing_tokens: int = 2048
    window_spacing_windows: int = 4
    window_margin_tokens: int = 256
    overlap_bytes_per_second: float = 1e9
    other_way_share: float = 0.97
    both_share: float = 0.9
    asking_share: float = 0.95
    watched_load_seconds: float = 0.2
    watched_load_times: float = 1.5
    least_patience_seconds: float = 2.0
    shortest_chunk_tokens: int = 16
    longest_chunk_tokens: int = 4096


COSTS = Costs()
