"""A store of 100,000 blocks: opening, looking up, making its catalog anew, verifying; and what more rows cost."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from benchmarks import catalog_rows, page_cache
from benchmarks.measure import BenchmarkError, Competitor, Options, Sample, interleave
from benchmarks.result import Case, Result, Target, make_case
from kvtier import PrefixStore
from kvtier.kv.page import Page
from kvtier.platform.filesystem import LOCAL
from kvtier.store.block import Block
from kvtier.store.chain import BlockId, TokenIds, chain_keys
from kvtier.store.format.block_file import encode_block
from kvtier.store.tiers.disk.folder import StoreFolder

ROOT = "c4" * 32
T = TypeVar("T")
_BLOCK = 256  # tokens
_PROMPT = 32_768  # tokens
_HASHED = 131_072  # tokens


def run(options: Options) -> Result:
    """Make the files, then measure on them."""
    rounds = options.rounds_or(7)
    blocks = 2_560 if options.quick else 102_400
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as scratch:
        folder = Path(scratch) / "many"
        options.say(f"writing {blocks:,} small blocks")
        prompts = _write_chains(folder, blocks)
        options.say("rebuilding the catalog")
        rebuild = _rebuilding(folder, blocks, 1 if options.quick else 3)
        opening = interleave([Competitor("PrefixStore(folder)", lambda: _timed_open(folder))], rounds, options.say)
        with PrefixStore(folder, host_budget=1) as store:
            looking = interleave(_lookups(store, prompts), rounds, options.say)
        options.say("writing larger blocks")
        large = Path(scratch) / "large"
        nbytes = _write_large(large, 8 if options.quick else 192)
        verifying = [_verify_case(large, nbytes, rounds, options, dropped=dropped) for dropped in _cache_states()]
    row_cases, row_targets = catalog_rows.cases(options, rounds)
    hashing = interleave([Competitor("chain_keys", _hash)], rounds, options.say)
    facts = {"blocks": blocks, "block_tokens": _BLOCK}
    cases = [
        make_case("rebuilding the catalog from the files", {"first open": rebuild}, "seconds", facts=facts),
        make_case("opening", opening, "seconds", facts=facts),
        make_case(f"match() of {_PROMPT:,} tokens", looking, "seconds", facts=facts),
        make_case(f"keys of {_HASHED:,} tokens", hashing, "seconds", facts=facts),
        *verifying,
        *row_cases,
    ]
    by_title = {case.title: case for case in cases}
    known = by_title[f"match() of {_PROMPT:,} tokens"]
    targets = [
        Target("seconds to make the catalog anew", cases[0].rows[0].spread.median, 60, "less than", "s"),
        Target("seconds to open", cases[1].rows[0].spread.median, 0.5, "less than", "s"),
        *(Target(f"seconds to look up: {row.name}", row.spread.median, 0.02, "less than", "s") for row in known.rows),
        Target("seconds to hash", cases[3].rows[0].spread.median, 0.05, "less than", "s"),
        *(
            Target(f"speed of {case.title}", case.ratio(_VERIFY), 0.7, "at least")
            for case in verifying
            if case.facts["page_cache"] == _DROPPED  # memory is no drive: there it is the checksums that take the time
        ),
        *row_targets,
    ]
    return Result(
        "catalog",
        (__doc__ or "").strip(),
        rounds,
        options.quick,
        tuple(cases),
        tuple(targets),
        ("The small blocks have one layer with one head of one dimension: it is their number that is measured.",),
    )


def _small(ids: TokenIds) -> tuple[Page, ...]:
    return (Page(torch.zeros(1, len(ids), 1), torch.zeros(1, len(ids), 1)),)


def _write_chains(folder: Path, blocks: int) -> list[TokenIds]:
    """Write chains of 128 blocks, half of which begin alike; return the ids of two of them."""
    dice = np.random.default_rng(0)
    files = StoreFolder(folder, LOCAL, durable=False)
    a_chain = _PROMPT // _BLOCK
    shared = dice.integers(0, 50_000, _PROMPT // 2)
    prompts: list[TokenIds] = []
    for number in range(blocks // a_chain):
        own = dice.integers(0, 50_000, _PROMPT)
        tokens = np.concatenate([shared, own[len(shared) :]]) if number % 2 else own
        for start, block in enumerate(chain_keys(ROOT, tokens, _BLOCK)):
            path = files.block(block.key, ROOT)
            if number < 2 or start * _BLOCK >= len(shared) or number % 2 == 0:
                files.write(path, encode_block(Block(block, _small(block.tokens), start * _BLOCK)))
        prompts = [*prompts, tokens][-2:]
    # What is shared was written once: add as many blocks after it, so that there are as many as were asked for.
    found = sum(1 for _ in files.block_files())
    parent = chain_keys(ROOT, shared, _BLOCK)[-1].key
    for _ in range(blocks - found):
        block = BlockId.of(ROOT, parent, dice.integers(0, 50_000, _BLOCK))
        files.write(files.block(block.key, ROOT), encode_block(Block(block, _small(block.tokens))))
    return prompts


def _rebuilding(folder: Path, blocks: int, times: int) -> tuple[Sample, ...]:
    samples = []
    for _ in range(times):
        for path in folder.glob("catalog.sqlite*"):
            path.unlink()
        samples.append(_timed_open(folder))
    with PrefixStore(folder, host_budget=1) as store:
        found = store.stats().tiers[1].blocks
    if found != blocks:
        raise BenchmarkError(f"the catalog made anew has {found} blocks of {blocks}")
    return tuple(samples)


def _timed_open(folder: Path) -> Sample:
    seconds, store = _timed(lambda: PrefixStore(folder, host_budget=1))
    store.close()
    return Sample({"seconds": seconds})


def _lookups(store: PrefixStore, prompts: Sequence[TokenIds]) -> list[Competitor]:
    own, shared = prompts
    other = shared.copy()
    other[len(other) // 2 + 1 :] = 60_000

    def look_up(tokens: TokenIds, expected: int) -> Callable[[], Sample]:
        def run() -> Sample:
            seconds, match = _timed(lambda: store.match(ROOT, tokens))
            if match.length != expected:
                raise BenchmarkError(f"match() found {match.length} tokens where {expected} are known")
            return Sample({"seconds": seconds})

        return run

    return [
        Competitor("all of it is known", look_up(own, len(own))),
        Competitor("it leaves what hundreds share, in mid-block", look_up(other, len(other) // 2 + 1)),
        Competitor("nothing begins so", look_up(np.full(_PROMPT, 60_000, dtype=np.int64), 0)),
    ]


def _hash() -> Sample:
    tokens = np.arange(_HASHED, dtype=np.int64)
    seconds, _ = _timed(lambda: chain_keys(ROOT, tokens, _BLOCK))
    return Sample({"seconds": seconds})


_READ = "reading the files plainly"
_VERIFY = "verify()"
_DROPPED = "dropped from the page cache"


def _write_large(folder: Path, blocks: int) -> int:
    """Commit blocks like those of SmolLM2-135M in bf16, with random bytes; return what their files take."""
    tokens = np.arange(blocks * _BLOCK, dtype=np.int64)

    def read(start: int, stop: int) -> tuple[Page, ...]:
        return tuple(Page(*(torch.randn(3, stop - start, 64).to(torch.bfloat16) for _ in "kv")) for _ in range(30))

    with PrefixStore(folder, host_budget=1, durability="lazy") as store:
        store.commit(ROOT, tokens, read)
    return sum(path.stat().st_size for path in (folder / "blocks").rglob("*.safetensors"))


def _cache_states() -> list[bool]:
    return [False, True] if page_cache.can_drop() else [False]


def _verify_case(folder: Path, nbytes: int, rounds: int, options: Options, *, dropped: bool) -> Case:
    files = sorted((folder / "blocks").rglob("*.safetensors"))

    def prepare() -> None:
        if dropped:
            page_cache.drop(files)

    def plainly() -> Sample:
        prepare()
        buffer = memoryview(bytearray(4 * 2**20))

        def read() -> None:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        seconds, _ = _timed(read)
        return Sample({"seconds": seconds})

    def with_verify() -> Sample:
        with PrefixStore(folder, host_budget=1) as store:
            prepare()
            seconds, report = _timed(store.verify)
        if not report.ok or report.nbytes != nbytes:
            raise BenchmarkError(f"verify() found {report.problems[:1]}, and read {report.nbytes} of {nbytes} bytes")
        return Sample({"seconds": seconds})

    samples = interleave([Competitor(_READ, plainly), Competitor(_VERIFY, with_verify)], rounds, options.say)
    state = _DROPPED if dropped else "in the page cache"
    return make_case(
        f"verify(), files {state}", samples, "seconds", baseline=_READ, facts={"bytes": nbytes, "page_cache": state}
    )


def _timed(run: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result
