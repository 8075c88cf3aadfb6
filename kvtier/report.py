"""TurnReport: the reused and computed tokens of one turn, the value of ``TieredCache.last_turn``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token at which a prompt differs from its known prefix."""

    index: int
    expected: int
    seen: int


@dataclass(frozen=True, slots=True)
class RowReport:
    """One row of a batch: its tokens without padding, and how many of them were reused.

    Attributes:
        prompt_tokens: its tokens.
        cached_tokens: of those, the tokens whose K and V were reused.
        generated_tokens: new tokens of all sequences that continue it.
        divergence: the first token at which it differs from the best known prefix.
        known_tokens: tokens that could have been reused if the row had been alone.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int = 0
    divergence: Divergence | None = None
    known_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TurnReport:
    """One turn, summed over its rows.

    Attributes:
        prompt_tokens: tokens of all prompts, without padding.
        cached_tokens: of those, the tokens whose K and V were reused.
        computed_tokens: of those, the tokens the model had to compute.
        generated_tokens: new tokens, up to each row's end of sequence; 0 until the turn is committed.
        cached_by_tier: ``cached_tokens`` by source tier: ``device``, ``host``, ``disk``, or a lower tier.
        restored_bytes: bytes of K and V copied from the store into the buffers.
        restore_seconds: time this turn spent matching, waiting for pages and copying them.
        miss_reason: why no more tokens were reused; None when all reusable tokens were.
        divergence: the first token at which row 0 differs from the best known prefix.
        rows: reports of the rows.
        hot_layers: layers whose K and V are on the device that computes. This value and the following ones up to
            ``peak_host_bytes`` are 0 without a ``device_budget``, and until the turn is committed.
        cold_layers: layers whose pages are in lower tiers.
        bytes_down: bytes of K and V that went to lower tiers.
        bytes_up: bytes of K and V fetched from lower tiers, some of them for the step after the last.
        waits: how often attention needed fetched pages.
        wait_seconds: time that the caller waited for these pages.
        peak_device_bytes: most bytes of buffers, unfinished pages and prefetch slots on any one device.
        peak_host_bytes: most bytes of pages in RAM, below the devices.
        known_tokens: tokens whose K and V were known. Tokens beyond ``cached_tokens`` were computed again, because
            transformers cuts the rows of a batch at one column, or a model's states are not known there.
        decision: how the turn began: ``load`` (from the store), ``compute`` (nothing, or nothing more, was reused),
            ``both`` (the front was computed while the rest loaded), ``held`` (from the buffers). Empty where nothing
            could be reused or kept.
        predicted_seconds: what loading and computing the prompt was expected to take; 0 where too little was known.
        actual_seconds: what it took, to the end of the forward pass with the end of the prompt. This value and the next
            are 0 until another forward pass began, or the turn ended.
        first_token_seconds: the same from the call on, finding the prefix included.
        other_ways: what the other decisions were expected to take, in seconds.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    cached_by_tier: Mapping[str, int] = field(
        default_factory=lambda: MappingProxyType({"device": 0, "host": 0, "disk": 0})
    )
    restored_bytes: int = 0
    restore_seconds: float = 0.0
    miss_reason: str | None = None
    divergence: Divergence | None = None
    rows: tuple[RowReport, ...] = ()
    hot_layers: int = 0
    cold_layers: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    peak_device_bytes: int = 0
    peak_host_bytes: int = 0
    known_tokens: int = 0
    decision: str = ""
    predicted_seconds: float = 0.0
    actual_seconds: float = 0.0
    first_token_seconds: float = 0.0
    other_ways: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
