"""The RAM tier with few blocks and with many: finding neighbours of a prompt, making room, and shrinking."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.measure import BenchmarkError, Competitor, Options, Sample, interleave
from benchmarks.result import Case, Result, Target, make_case
from kvtier.kv.page import Page
from kvtier.store.block import Block
from kvtier.store.chain import BlockId, TokenIds
from kvtier.store.eviction.adaptive import Adaptive
from kvtier.store.tiers.host.tier import HostTier

ROOT = "c4" * 32
_BLOCK = 256  # tokens
_SHARED = 128  # of them, the same in all siblings
_AFTER_A_PARENT = 100  # blocks, where not all are siblings
_SIBLINGS = (1_000, 20_000)
_BLOCKS = (10_000, 50_000)
_REPEATS = 200  # calls in one sample: a single one is too short for the clock
_MOST = 2.0  # a search takes log2(20,000) / log2(1,000) = 1.4 times the steps

_PAGES = (Page(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)),)


def run(options: Options) -> Result:
    """Fill tiers of two sizes each, and measure the same calls on both."""
    rounds = options.rounds_or(7)
    part = 10 if options.quick else 1
    siblings = [_fill(count // part, count // part, options) for count in _SIBLINGS]
    spread = [_fill(count // part, _AFTER_A_PARENT, options) for count in _BLOCKS]
    cases = [
        _compare("nearest()", "siblings", siblings, _nearest, rounds, options),
        _compare("tails()", "siblings", siblings, _tails, rounds, options),
        _compare("put() that evicts a block", "blocks", spread, _put, rounds, options),
        _compare("shrink(), for each block that goes", "blocks", spread, _shrink, rounds, options),
    ]
    targets = [
        Target(f"cost of {case.title}, {case.rows[1].name} against {case.rows[0].name}", ratio, _MOST, "at most")
        for case in cases
        for ratio in (case.ratio(case.rows[1].name),)
    ]
    return Result(
        "ram_tier",
        (__doc__ or "").strip(),
        rounds,
        options.quick,
        tuple(cases),
        tuple(targets),
        ("The blocks have one page of one number: the size of a block decides none of this.",),
    )


class _Filled:
    """A tier that is full of blocks, the ids of one of them, and numbers for new ones."""

    def __init__(self, count: int, after_a_parent: int) -> None:
        self.count = count
        self.tier = HostTier(2**40, Adaptive(), time.time)
        self.known = _ids(count // 2)
        self._next = count
        for number in range(count):
            parent = ROOT if after_a_parent == count else f"{number // after_a_parent:064x}"
            self.tier.put(_block(_ids(number), parent))
        self.tier.budget_bytes = self.tier.nbytes

    def new(self) -> Block:
        """Return a block that is not here, after the root."""
        self._next += 1
        return _block(_ids(self._next), ROOT)


def _fill(count: int, after_a_parent: int, options: Options) -> _Filled:
    options.say(f"filling a tier with {count:,} blocks")
    return _Filled(count, after_a_parent)


def _ids(number: int) -> TokenIds:
    tokens = np.arange(_BLOCK, dtype=np.int64)
    tokens[_SHARED:] += 1_000 * number
    return tokens


def _block(tokens: TokenIds, parent: str) -> Block:
    return Block(BlockId.of(ROOT, parent, tokens), _PAGES)


def _compare(
    title: str,
    what: str,
    tiers: list[_Filled],
    measure: Callable[[_Filled], Sample],
    rounds: int,
    options: Options,
) -> Case:
    def competitor(filled: _Filled) -> Competitor:
        return Competitor(f"{filled.count:,} {what}", lambda: measure(filled))

    samples = interleave([competitor(filled) for filled in tiers], rounds, options.say)
    facts: dict[str, Any] = {"block_tokens": _BLOCK, "calls_in_a_sample": _REPEATS}
    baseline = f"{tiers[0].count:,} {what}"
    return make_case(title, samples, "seconds", baseline=baseline, ratio_kind="cost", facts=facts)


def _nearest(filled: _Filled) -> Sample:
    tokens = filled.known.copy()
    tokens[-1] += 1
    sample = _timed(lambda: filled.tier.nearest(ROOT, tokens))
    (found,) = filled.tier.nearest(ROOT, tokens)
    if not np.array_equal(found.tokens, filled.known):
        raise BenchmarkError("nearest() found another block than the one that was asked for")
    return sample


def _tails(filled: _Filled) -> Sample:
    tokens = np.append(filled.known, 0)
    sample = _timed(lambda: filled.tier.tails(ROOT, tokens))
    if len(filled.tier.tails(ROOT, tokens)) != 1:
        raise BenchmarkError("tails() found other blocks than the one that the tokens begin with")
    return sample


def _put(filled: _Filled) -> Sample:
    blocks = iter([filled.new() for _ in range(_REPEATS)])
    evicted = filled.tier.counts["evictions"]
    sample = _timed(lambda: filled.tier.put(next(blocks)))
    if filled.tier.counts["evictions"] != evicted + _REPEATS:
        raise BenchmarkError("put() did not evict one block each time")
    return sample


def _shrink(filled: _Filled) -> Sample:
    """Shrink by some blocks, and put others for them off the clock."""
    before = filled.tier.nbytes
    per_block = before // len(filled.tier)
    started = time.perf_counter()
    gone = filled.tier.shrink(before - _REPEATS * per_block)
    seconds = time.perf_counter() - started
    if len(gone) != _REPEATS:
        raise BenchmarkError(f"shrink() let {len(gone)} blocks go instead of {_REPEATS}")
    for _ in gone:
        filled.tier.put(filled.new())
    return Sample({"seconds": seconds / _REPEATS})


def _timed(call: Callable[[], object]) -> Sample:
    """Return the seconds that one call takes, of some in a row."""
    started = time.perf_counter()
    for _ in range(_REPEATS):
        call()
    return Sample({"seconds": (time.perf_counter() - started) / _REPEATS})
