"""Residency: which layers are cold, and what a budget must hold at least."""

from __future__ import annotations

import functools
from collections.abc import Sequence

PREFETCH_DEPTH = 2


@functools.lru_cache(maxsize=64)
def cold_order(layers: int) -> tuple[int, ...]:
    """Return the order in which ``layers`` layers turn cold: any first few of them are spread evenly.

    The base-2 van der Corput sequence (J. G. van der Corput, 1935), of which every beginning is spread evenly: copies
    of cold layers hide behind the hot ones between them.
    """
    bits = max(1, (layers - 1).bit_length())
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    # The last layer goes first: the beginning of the next step then hides behind what follows attention.
    return tuple(layers - 1 - i for i in reversed_bits if i < layers)


def round_up(columns: int, page_tokens: int) -> int:
    """Return ``columns`` as whole pages."""
    return -(-columns // page_tokens) * page_tokens


def smallest_budget_bytes(
    cold_token_bytes: Sequence[int], rows: int, columns: int, page_tokens: int, hot_bytes: int = 0
) -> int:
    """Return the bytes for ``columns`` tokens when every layer that may be cold is cold.

    That is one slot per layer in flight, each as large as the largest cold layer, and the unfinished page of each.

    Args:
        cold_token_bytes: K and V of one token in each layer that may turn cold.
        rows: sequences in the batch.
        columns: tokens of the longest.
        page_tokens: tokens of a page.
        hot_bytes: what layers hold that must stay hot.
    """
    slots = min(PREFETCH_DEPTH, len(cold_token_bytes))
    slot = max(cold_token_bytes, default=0) * rows * round_up(columns, page_tokens)
    return hot_bytes + slots * slot + sum(cold_token_bytes) * rows * page_tokens
