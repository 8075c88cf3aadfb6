"""Statistics of a store in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kvtier.store.manage.stats import StoreStats
from kvtier.store.tiers.base import TierStats

# Shown as 0 before they happen: a series that begins at 1 shows no increase.
_MISS_REASONS = ("unknown", "diverged", "shorter", "damaged", "unavailable", "gone")
_ERROR_REASONS = ("write", "read", "catalog", "delete")
_Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Metric:
    """One family of series. ``of_process``: whether it is about this process only, settings included."""

    name: str
    kind: Literal["gauge", "counter"]
    text: str
    values: tuple[tuple[_Labels, int], ...]
    of_process: bool = True


def exposition(stats: StoreStats, *, labels: _Labels | None = None, of_process: bool = True) -> str:
    """Return ``stats`` as text, to be served as ``text/plain; version=0.0.4``. Sizes are bytes; counts only grow.

    Args:
        stats: the result of ``PrefixStore.stats``.
        labels: labels for every series, e.g. ``{"service": "chat"}``.
        of_process: False leaves out the series of the process that ``stats`` comes from (budgets, leases, queue,
            counts), and keeps those of the folder.

    Raises:
        ValueError: Prometheus does not accept the name of a label, or it is used already.
    """
    fixed = dict(labels or {})
    for name in fixed:
        # Rule of Prometheus: ASCII letters, digits and underscores, no digit first; two underscores first are reserved.
        ascii_identifier = name.isascii() and name.isidentifier()
        if not ascii_identifier or name.startswith("__") or name in ("tier", "reason"):
            raise ValueError(f"labels: {name!r:.80} cannot be the name of a label here; pass another, e.g. 'service'")
    if not of_process:
        stats = replace(stats, tiers=tuple(tier for tier in stats.tiers if tier.tier == "disk"))
    lines: list[str] = []
    for metric in _metrics(stats):
        if metric.of_process and not of_process:
            continue
        lines.append(f"# HELP {metric.name} {metric.text}")
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        lines += [f"{metric.name}{_braces({**fixed, **own})} {value}" for own, value in metric.values]
    return "\n".join(lines) + "\n"


def _metrics(stats: StoreStats) -> Iterator[_Metric]:
    tiers = stats.tiers
    for name, text, field in (
        ("held_bytes", "Bytes that blocks take.", "nbytes"),
        ("blocks", "Blocks that can be found.", "blocks"),
        ("pinned_blocks", "Last blocks of pinned names.", "pinned_blocks"),
    ):
        yield _Metric(f"kvtier_store_{name}", "gauge", text, _by_tier(tiers, field), of_process=False)
    yield _gauge("names", "Prefixes that have a name.", stats.names, of_process=False)
    yield _Metric(
        "kvtier_store_budget_bytes", "gauge", "What held bytes never exceed.", _by_tier(tiers, "budget_bytes")
    )
    yield _Metric("kvtier_store_leased_blocks", "gauge", "Blocks being read.", _by_tier(tiers, "leased_blocks"))
    yield _gauge("queued_writes", "Blocks waiting to be written to disk.", stats.queued_writes)
    yield _gauge("paused", "1 while nothing is written to disk, 0 otherwise.", int(stats.paused is not None))
    yield _Metric("kvtier_store_hits_total", "counter", "Blocks that were restored.", _by_tier(tiers, "hits"))
    yield _Metric(
        "kvtier_store_evictions_total", "counter", "Blocks that went to make room.", _by_tier(tiers, "evictions")
    )
    yield _Metric(
        "kvtier_store_expirations_total",
        "counter",
        "Blocks that went because nothing used them.",
        _by_tier(tiers, "expirations"),
    )
    yield _counter("lookups", "Prompts that were matched.", stats.lookups)
    yield _counter("lookup_tokens", "Tokens of prompts that were matched.", stats.lookup_tokens)
    yield _counter("hit_tokens", "Of those, tokens that were found.", stats.hit_tokens)
    yield _counter("committed_tokens", "Tokens that were new.", stats.committed_tokens)
    yield _counter("written_bytes", "Bytes of block files that were written.", stats.written_bytes)
    misses = "Lookups that found less than all, and blocks that could not be restored."
    yield _Metric("kvtier_store_misses_total", "counter", misses, _by_reason(stats.misses, _MISS_REASONS))
    errors = "Failures of the disk tier that cost a recompute."
    yield _Metric("kvtier_store_errors_total", "counter", errors, _by_reason(stats.errors, _ERROR_REASONS))


def _gauge(name: str, text: str, value: int, *, of_process: bool = True) -> _Metric:
    return _Metric(f"kvtier_store_{name}", "gauge", text, (({}, value),), of_process)


def _counter(name: str, text: str, value: int) -> _Metric:
    return _Metric(f"kvtier_store_{name}_total", "counter", text, (({}, value),))


def _by_tier(tiers: Iterable[TierStats], field: str) -> tuple[tuple[_Labels, int], ...]:
    return tuple(({"tier": tier.tier}, getattr(tier, field)) for tier in tiers)


def _by_reason(counts: Mapping[str, int], known: Iterable[str]) -> tuple[tuple[_Labels, int], ...]:
    reasons = [*known, *sorted(counts.keys() - set(known))]
    return tuple(({"reason": reason}, counts.get(reason, 0)) for reason in reasons)


def _braces(labels: _Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
