"""Time to bring 4,096 tokens of K and V from a store into the buffers, against reading the same bytes plainly."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks import page_cache
from benchmarks.measure import BenchmarkError, Competitor, Options, Sample, interleave
from benchmarks.result import Case, Result, Target, make_case
from benchmarks.workload import KeysValues, expect_source, keys_values, load_chat, prefill, running_text, seeded
from kvtier import PrefixStore, TieredCache
from kvtier.cli.demo.conversation import ChatModel

PLAIN = "safetensors and memcpy"
PLAIN_NEW_MEMORY = "safetensors and memcpy, new memory"
DISK = "TieredCache, from disk, raw"
DISK_ZSTD = "TieredCache, from disk, zstd"
RAM = "TieredCache, from RAM"
_CODECS = ("raw", "zstd")


def run(options: Options) -> Result:
    """Measure with the files in the page cache, and again with each round's files dropped from it."""
    rounds = options.rounds_or(9)
    tokens = 512 if options.quick else 4096
    chat = load_chat()
    ids = running_text(chat, tokens + 1)
    known = keys_values(prefill(chat, ids[:tokens]), tokens)
    notes = ["begin() and the first update() of every layer, with one token; the store is open already."]
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as scratch_name:
        folders = {codec: Path(scratch_name) / codec for codec in _CODECS}
        for codec, folder in folders.items():
            with PrefixStore(folder, compression=codec) as store:
                seeded(store, chat, ids, known).close()
        bench = _Bench(chat, ids, known, folders)
        cases = [bench.case(rounds, options, dropped=False)]
        if page_cache.can_drop():
            cases.append(bench.case(rounds, options, dropped=True))
        else:
            notes.append("This system cannot drop files from the page cache: that case was left out.")
    warm, *dropped = cases
    targets = [
        Target("from disk, raw, against reading plainly (page cache warm)", warm.ratio(DISK), 1.2, "at most"),
        Target("from RAM, against reading plainly", warm.ratio(RAM), 0.8, "at most"),
    ]
    targets += [
        Target("from disk, raw, against reading plainly (page cache dropped)", case.ratio(DISK), 1.0, "at most")
        for case in dropped
    ]
    return Result(
        "restore",
        (__doc__ or "").strip(),
        rounds,
        options.quick,
        tuple(cases),
        tuple(targets),
        tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class _PlacedFile:
    """A block file and where its tokens stand in the sequence."""

    path: Path
    start: int
    stop: int


class _Bench:
    """The competitors: two stores with the same bytes, and a plain reader of the raw one's files."""

    def __init__(self, chat: ChatModel, ids: tuple[int, ...], known: KeysValues, folders: Mapping[str, Path]) -> None:
        self._chat = chat
        self._ids = ids
        self._known = known
        self._tokens = known[0][0].shape[2]
        self._folders = folders
        self._raw_files = _in_order(folders["raw"])
        self._target = self._new_target()
        self._dropped = False
        self._resident = 0.0
        for k, v in self._target:  # memory that was written once
            k.zero_()
            v.zero_()

    def case(self, rounds: int, options: Options, *, dropped: bool) -> Case:
        """Measure all competitors of one state of the page cache."""
        self._dropped, self._resident = dropped, 0.0
        state = "page cache dropped" if dropped else "page cache warm"
        options.say(state)
        found = [
            Competitor(PLAIN, lambda: self._plainly(self._target)),
            Competitor(PLAIN_NEW_MEMORY, lambda: self._plainly(None)),
            Competitor(DISK, lambda: self._from_disk("raw")),
            Competitor(DISK_ZSTD, lambda: self._from_disk("zstd")),
        ]
        if not dropped:
            found.append(Competitor(RAM, self._from_ram))
        nbytes = sum(k.nbytes + v.nbytes for k, v in self._known)
        facts = {"page_cache": state, "tokens": self._tokens, "bytes": nbytes, "file_bytes": self._file_bytes()}
        samples = interleave(found, rounds, options.say)
        if dropped:
            facts["share_of_file_pages_still_cached"] = self._resident
        return make_case(
            f"{self._tokens} tokens, {nbytes / 1e6:.0f} MB, {state}",
            samples,
            "restore_s",
            baseline=PLAIN,
            ratio_kind="cost",
            facts=facts,
        )

    def _file_bytes(self) -> dict[str, int]:
        return {codec: sum(p.stat().st_size for p in _block_files(folder)) for codec, folder in self._folders.items()}

    def _sample(self, seconds: float) -> Sample:
        nbytes = sum(k.nbytes + v.nbytes for k, v in self._known)
        return Sample({"restore_s": seconds, "bytes_per_s": nbytes / seconds})

    def _new_target(self) -> KeysValues:
        return [(torch.empty_like(k.contiguous()), torch.empty_like(v.contiguous())) for k, v in self._known]

    def _prepare(self, folder: Path) -> None:
        if self._dropped:
            files = _block_files(folder)
            page_cache.drop(files)
            self._resident = max(self._resident, page_cache.resident_share(files))

    def _plainly(self, target: KeysValues | None) -> Sample:
        self._prepare(self._folders["raw"])
        started = time.perf_counter()
        into = self._new_target() if target is None else target
        for file in self._raw_files:
            with safe_open(file.path, framework="pt") as tensors:
                for layer, (k, v) in enumerate(into):
                    k[0, :, file.start : file.stop] = tensors.get_tensor(f"k.{layer}")
                    v[0, :, file.start : file.stop] = tensors.get_tensor(f"v.{layer}")
        seconds = time.perf_counter() - started
        self._check(into)
        return self._sample(seconds)

    def _from_disk(self, codec: str) -> Sample:
        with PrefixStore(self._folders[codec]) as store:
            self._prepare(self._folders[codec])
            return self._restored(store, "disk")

    def _from_ram(self) -> Sample:
        with PrefixStore() as store:
            seeded(store, self._chat, self._ids, self._known).close()
            return self._restored(store, "host")

    def _restored(self, store: PrefixStore, tier: str) -> Sample:
        prompt = torch.tensor([self._ids])
        one = [(k[:, :, :1].clone(), v[:, :, :1].clone()) for k, v in self._known]
        cache = TieredCache(store, reuse="always")
        started = time.perf_counter()
        report = cache.begin(self._chat.model, prompt)
        for layer, (k, v) in enumerate(one):
            cache.update(k, v, layer)
        seconds = time.perf_counter() - started
        expect_source(report.cached_by_tier, {tier: self._tokens})
        self._check(keys_values(cache, self._tokens))
        cache.close()
        return self._sample(seconds)

    def _check(self, restored: KeysValues) -> None:
        """Compare bytes with those that were stored.

        Raises:
            BenchmarkError: they differ.
        """
        for layer, (seen, expected) in enumerate(zip(restored, self._known, strict=True)):
            if not all(torch.equal(s, e) for s, e in zip(seen, expected, strict=True)):
                raise BenchmarkError(f"layer {layer} does not hold the bytes that were stored")


def _block_files(folder: Path) -> Sequence[Path]:
    return sorted((folder / "blocks").rglob("*.safetensors"))


def _in_order(folder: Path) -> Sequence[_PlacedFile]:
    """Return the block files of a store that holds one sequence, in its order."""
    followers: dict[str, tuple[Path, str, int]] = {}
    root = ""
    for path in _block_files(folder):
        with safe_open(path, framework="pt") as tensors:
            metadata = tensors.metadata()
            followers[metadata["parent"]] = path, metadata["key"], tensors.get_tensor("tokens").shape[0]
            root = metadata["root"]
    placed: list[_PlacedFile] = []
    parent, start = root, 0
    while parent in followers:
        path, parent, tokens = followers[parent]
        placed.append(_PlacedFile(path, start, start + tokens))
        start += tokens
    if len(placed) != len(followers):
        raise BenchmarkError(f"{folder} holds more than one sequence")
    return placed
