"""What the catalog alone costs, rows without files: among few siblings and many, and among few blocks and many."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.measure import BenchmarkError, Competitor, Options, Sample, interleave
from benchmarks.result import Case, Target, make_case
from kvtier.store.chain import BlockId, chain_keys
from kvtier.store.eviction.adaptive import Adaptive
from kvtier.store.tiers.disk.catalog.blocks import Catalog, Prepared
from kvtier.store.tiers.disk.catalog.database import Database

_ROOT = "c4" * 32
_BLOCK = 256  # tokens
_CHAIN = 128  # blocks
_BYTES = 10
_OWNER = "benchmark"
_TIMES = 20  # calls of each kind in a sample
_MOST_RATIO = 3.0


def cases(options: Options, rounds: int) -> tuple[list[Case], list[Target]]:
    """Measure each operation among few and many; return the cases, and what their ratios should be."""
    crowds = {
        "siblings": (200, 1_000) if options.quick else (1_000, 20_000),
        "blocks": (500, 2_000) if options.quick else (2_000, 20_000, 200_000),
    }
    found: list[Case] = []
    targets: list[Target] = []
    for kind, sizes in crowds.items():
        with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as scratch:
            options.say(f"rows of {', '.join(f'{size:,}' for size in sizes)} {kind}")
            crowd = [_Crowd(Path(scratch) / f"{size}.sqlite", kind, size) for size in sizes]
            try:
                for operation in _OPERATIONS:
                    names = [f"among {each.size:,}" for each in crowd]
                    runs = [Competitor(name, each.runner(operation)) for name, each in zip(names, crowd, strict=True)]
                    samples = interleave(runs, rounds, options.say)
                    title = f"{operation} among {kind}"
                    facts = {"calls": _TIMES, "block_tokens": _BLOCK}
                    case = make_case(title, samples, "seconds", baseline=names[0], ratio_kind="cost", facts=facts)
                    found.append(case)
                    targets.append(
                        Target(
                            f"{operation}: {sizes[-1]:,} {kind} against {sizes[0]:,}",
                            case.ratio(names[-1]),
                            _MOST_RATIO,
                            "at most",
                        )
                    )
            finally:
                for each in crowd:
                    each.close()
    return found, targets


class _Crowd:
    """A catalog of ``size`` blocks: siblings after one root, or chains."""

    def __init__(self, path: Path, kind: str, size: int) -> None:
        self.size = size
        self.known: list[BlockId] = []
        self._dice = np.random.default_rng(size)
        self._database = Database(path)
        self.catalog = Catalog(self._database, Adaptive(), time.time)
        self.catalog.rebuild(lambda: ((block, _BYTES, 0.0) for block in self._blocks(kind)))
        self.catalog.touch([block.key for block in self.known], {})  # others are evicted before them

    def _blocks(self, kind: str) -> Iterator[BlockId]:
        """Yield blocks; keep as many of them as a sample asks for."""
        made = 0
        while made < self.size:
            chain = [self.new_block()] if kind == "siblings" else self._chain(min(_CHAIN, self.size - made))
            yield from chain
            made += len(chain)
            if len(self.known) < _TIMES:
                self.known.append(chain[-1])

    def _chain(self, blocks: int) -> list[BlockId]:
        return chain_keys(_ROOT, self._dice.integers(0, 50_000, blocks * _BLOCK), _BLOCK)

    def new_block(self) -> BlockId:
        """Return a block after the root that is not there."""
        return BlockId.of(_ROOT, _ROOT, self._dice.integers(0, 50_000, _BLOCK))

    def put(self, block: BlockId) -> None:
        """Put a block in."""
        if self.catalog.prepare_store(block, _BYTES, 2**60, _OWNER) is not Prepared.RESERVED:
            raise BenchmarkError("a new block was there already")
        self.catalog.complete_store(block.key, _OWNER)

    @contextmanager
    def as_many_as_before(self) -> Iterator[list[BlockId]]:
        """Add blocks for a sample, or take away those that it added."""
        new = [self.new_block() for _ in range(_TIMES)]
        before, _ = self.catalog.counts()
        yield new
        self.delete([block.key for block in new])
        after, _ = self.catalog.counts()
        for _ in range(before - after):
            self.put(self.new_block())

    def delete(self, keys: list[str]) -> None:
        """Delete blocks, as far as they are there."""
        self.catalog.complete_delete([place.key for place in self.catalog.discard(keys, _OWNER)])

    def runner(self, operation: str) -> Callable[[], Sample]:
        """Return what measures one operation."""

        def run() -> Sample:
            with self.as_many_as_before() as new:
                prepared, each = _OPERATIONS[operation]
                if prepared:
                    for block in new:
                        self.put(block)
                started = time.perf_counter()
                for number in range(_TIMES):
                    each(self, new[number], self.known[number % len(self.known)])
                return Sample({"seconds": (time.perf_counter() - started) / _TIMES})

        return run

    def close(self) -> None:
        """Close the catalog."""
        self._database.close()


def _nearest(crowd: _Crowd, new: BlockId, known: BlockId) -> None:
    if not crowd.catalog.nearest(known.parent, known.tokens):
        raise BenchmarkError("a known block was not found")


def _tails(crowd: _Crowd, new: BlockId, known: BlockId) -> None:
    if crowd.catalog.tails(known.parent, known.tokens):
        raise BenchmarkError("a block begins with a shorter one")


def _evict(crowd: _Crowd, new: BlockId, known: BlockId) -> None:
    gone = crowd.catalog.evict(_BYTES, _OWNER, "", lambda _: False, at_most=1)
    if len(gone) != 1:
        raise BenchmarkError("nothing could be evicted")
    crowd.catalog.complete_delete([gone[0].key])


_OPERATIONS: dict[str, tuple[bool, Callable[[_Crowd, BlockId, BlockId], None]]] = {
    "put": (False, lambda crowd, new, known: crowd.put(new)),
    "nearest": (False, _nearest),
    "tails": (False, _tails),
    "delete": (True, lambda crowd, new, known: crowd.delete([new.key])),
    "evict": (True, _evict),
}
"""Each with whether the new blocks are put in before the clock starts."""
