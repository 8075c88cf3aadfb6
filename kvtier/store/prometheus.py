"""Statistics of a store in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kvtier.store.manage.stats import StoreStats

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
    def by_tier(name: str, text: str, field: str, *, of_process: bool = True) -> _Metric:
        values = tuple(({"tier": tier.tier}, getattr(tier, field)) for tier in stats.tiers)
        return _metric(name, text, values, of_process=of_process)

    yield by_tier("held_bytes", "Bytes that blocks take.", "nbytes", of_process=False)
    yield by_tier("blocks", "Blocks that can be found.", "blocks", of_process=False)
    yield by_tier("pinned_blocks", "Last blocks of pinned names.", "pinned_blocks", of_process=False)
    yield _one("names", "Prefixes that have a name.", stats.names, of_process=False)
    yield by_tier("budget_bytes", "What held bytes never exceed.", "budget_bytes")
    yield by_tier("leased_blocks", "Blocks being read.", "leased_blocks")
    yield _one("queued_writes", "Blocks waiting to be written to disk.", stats.queued_writes)
    yield _one("paused", "1 while nothing is written to disk, 0 otherwise.", int(stats.paused is not None))
    yield by_tier("hits_total", "Blocks that were restored.", "hits")
    yield by_tier("evictions_total", "Blocks that went to make room.", "evictions")
    yield by_tier("expirations_total", "Blocks that went because nothing used them.", "expirations")
    yield _one("lookups_total", "Prompts that were matched.", stats.lookups)
    yield _one("lookup_tokens_total", "Tokens of prompts that were matched.", stats.lookup_tokens)
    yield _one("hit_tokens_total", "Of those, tokens that were found.", stats.hit_tokens)
    yield _one("committed_tokens_total", "Tokens that were new.", stats.committed_tokens)
    yield _one("written_bytes_total", "Bytes of block files that were written.", stats.written_bytes)
    text = "Blocks that stayed in RAM, since computing them is much faster than loading them."
    yield _one("not_worth_writing_total", text, stats.not_worth_writing)
    misses = "Lookups that found less than all, and blocks that could not be restored."
    yield _metric("misses_total", misses, _by_reason(stats.misses, _MISS_REASONS))
    errors = "Failures of the disk tier that cost a recompute."
    yield _metric("errors_total", errors, _by_reason(stats.errors, _ERROR_REASONS))


def _metric(name: str, text: str, values: tuple[tuple[_Labels, int], ...], *, of_process: bool = True) -> _Metric:
    kind: Literal["gauge", "counter"] = "counter" if name.endswith("_total") else "gauge"
    return _Metric(f"kvtier_store_{name}", kind, text, values, of_process)


def _one(name: str, text: str, value: int, *, of_process: bool = True) -> _Metric:
    return _metric(name, text, (({}, value),), of_process=of_process)


def _by_reason(counts: Mapping[str, int], known: Iterable[str]) -> tuple[tuple[_Labels, int], ...]:
    reasons = [*known, *sorted(counts.keys() - set(known))]
    return tuple(({"reason": reason}, counts.get(reason, 0)) for reason in reasons)


def _braces(labels: _Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
