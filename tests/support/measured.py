"""Costs of the models of the store tests, as if they had been measured."""

from __future__ import annotations

from kvtier import PrefixStore
from kvtier.costs.book import CostBook
from kvtier.costs.prefill import PrefillCost, PrefillSample
from kvtier.costs.transfer import TransferSample
from tests.support.stores import ROOT, block, count

COST = PrefillCost(0.01, 1e-3, 1e-9, 1e-6)


def measure(
    store: PrefixStore,
    root: str = ROOT,
    *,
    speed: float | None = None,
    factor: float = 1.0,
    loads: int = 4,
    machine: str = "here",
) -> CostBook:
    """Note what passes of a model take, and loads of files at ``speed`` bytes a second."""
    book = store.costs(root, machine)
    book.token_bytes = float(block(count(1)).nbytes)
    for tokens in (1, 64, 700, 4096):
        book.note_pass(PrefillSample(tokens, 0, factor * COST.seconds(tokens)))
    for n in range(1, loads + 1 if speed else 1):
        book.note_load("disk", TransferSample(10**6 * n, 10**6 * n / (speed or 1.0)))
    return book
