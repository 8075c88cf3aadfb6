"""Numbers as text: of reports, of the tables of commands, and of pictures."""

from __future__ import annotations

from collections.abc import Mapping

_SHORTEST_SECONDS = 0.001


def seconds_text(seconds: float) -> str:
    """Return seconds of a sentence, with two digits, or whole ones: ``0.021 s``, ``3.9 s``, ``47 s``, ``1,200 s``."""
    if seconds < _SHORTEST_SECONDS:
        return "under 0.001 s"
    if seconds < 0.9995:
        return f"{seconds:.2g} s"
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:,.0f} s"


def duration_text(seconds: float) -> str:
    """Return seconds of a table, with three digits in the unit that suits: ``350 µs``, ``1.25 ms``, ``12.5 s``."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def tiers_text(tokens_by_tier: Mapping[str, int]) -> str:
    """Return the tokens of each tier: ``device 0, host 14, disk 1,153``."""
    return ", ".join(f"{tier} {tokens:,}" for tier, tokens in tokens_by_tier.items())


def reused_text(cached_tokens: int, prompt_tokens: int, cached_by_tier: Mapping[str, int]) -> str:
    """Return how many tokens of a prompt were reused, and from where."""
    return f"{cached_tokens:,} of {prompt_tokens:,} prompt tokens reused ({tiers_text(cached_by_tier)})"
