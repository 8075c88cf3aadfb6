"""A state machine compares the window blocks of a store with a dictionary of all that was ever put.

While nothing is evicted or damaged, lookups find exactly the window blocks of the dictionary; afterwards they may find
fewer, never others. Chains are found as if there were no window blocks. Every byte of every layer is compared, at every
place that a span covers. Pinned names keep the window blocks that end them.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier import PrefixStore
from kvtier.errors import BlockError
from tests.support.crashes import assert_sound
from tests.support.stores import (
    DAMAGES,
    DIM,
    HEADS,
    OTHER_ROOT,
    ROOT,
    block_files,
    bytes_in_ram,
    bytes_on_disk,
    damage,
    leftovers,
    shared,
)
from tests.support.windows import LAYERS, SLIDING, check_restored, keep, united

ROOMY = 2**30
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 4
FILE_BYTES = 8192

Tokens = tuple[int, ...]
tokens = st.lists(st.integers(1, 3), min_size=1, max_size=14).map(tuple)
roots = st.sampled_from([ROOT, ROOT, OTHER_ROOT])  # the model of the second one has states
places = st.integers(0, 255)
spans = st.lists(st.tuples(st.integers(0, 13), st.integers(1, 14)), max_size=3)
columns = st.sets(st.integers(1, 14), max_size=3)


def within(ranges, others):
    """Whether each of ``ranges`` lies within one of ``others``."""
    return all(any(a <= start and stop <= b for a, b in others) for start, stop in ranges)


class WindowMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(
        on_disk=st.booleans(),
        block_size=st.sampled_from([1, 3, 4]),
        compression=st.sampled_from(["raw", "zstd"]),
        slides=st.sampled_from([SLIDING, SLIDING, (0, 1, 2)]),
        host_tokens=st.sampled_from([None, None, 3, 10]),
        disk_files=st.sampled_from([None, None, 4]),
        tail_delay=st.sampled_from([0, 60.0]),
    )
    def open(self, on_disk, block_size, compression, slides, host_tokens, disk_files, tail_delay):
        self.folder = Path(tempfile.mkdtemp(prefix="kvtier-store-")) if on_disk else None
        self.settings = {
            "host_budget": ROOMY if host_tokens is None else host_tokens * TOKEN_BYTES,
            "disk_budget": ROOMY if disk_files is None else disk_files * FILE_BYTES,
            "block_size": block_size,
            "compression": compression,
            "tail_delay": tail_delay,
            "free_space_floor": 0,
        }
        self.size, self.slides = block_size, slides
        self.is_roomy = self.all_is_kept = disk_files is None if on_disk else host_tokens is None
        self.chains: set[tuple[str, Tokens]] = set()
        self.windows: dict[tuple[str, Tokens], int] = {}  # all tokens up to the last of a window block → its first
        self.named: dict[str, tuple[str, Tokens, list[tuple[int, int]]]] = {}
        self.stores = [PrefixStore(self.folder, **self.settings)]

    def store(self, which: int) -> PrefixStore:
        return self.stores[which % len(self.stores)]

    def known(self, root: str, question: Tokens) -> int:
        return max((shared(question, other) for known, other in self.chains if known == root), default=0)

    def covered(self, root: str, question: Tokens) -> list[tuple[int, int]]:
        """Return the ranges of ``question``, all of which is matched, that window blocks cover."""
        ranges: list[tuple[int, int]] = []
        for start in range(0, len(question), self.size):
            stop = min(start + self.size, len(question))
            if stop - start == self.size:
                length = self.size if self.windows.get((root, question[:stop])) == start else 0
            else:
                beside = [other for (known, other), first in self.windows.items() if known == root and first == start]
                length = max((shared(other, question) - start for other in beside), default=0)
            if length <= 0:
                continue
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], start + length)
            else:
                ranges.append((start, start + length))
        return ranges

    @rule(target=sequences, which=places, new=tokens, root=roots, ranges=spans, at=columns)
    def commit(self, which, new, root, ranges, at):
        ranges = [(start, min(stop, len(new))) for start, stop in ranges if start < min(stop, len(new))]
        at = {position for position in at if position <= len(new)} if root == OTHER_ROOT else None
        states = None if at is None else {position: torch.full((3,), position, dtype=torch.uint8) for position in at}
        keep(self.store(which), np.array(new), *ranges, root=root, states=states, slides=self.slides)
        full = len(new) // self.size * self.size
        ends = {*range(self.size, full + 1, self.size), *(at if at is not None else [len(new)])}
        for end in ends:
            start = (end - 1) // self.size * self.size
            self.chains.add((root, new[:end]))
            if any(first <= start and end <= last for first, last in ranges):
                self.windows[root, new[:end]] = start
        for store in self.stores:
            store.flush()  # other stores find blocks only on disk
        for store in self.stores:
            self.check(store, root, new, None)
        return new

    @rule(target=sequences, which=places, sequence=sequences, cut=places, more=tokens, root=roots, ranges=spans)
    def commit_a_branch(self, which, sequence, cut, more, root, ranges):
        new = (sequence[: cut % (len(sequence) + 1)] + more)[:20]
        return self.commit(which, new, root, [*ranges, (0, 20)][-2:], {len(new)})

    @rule(which=places, sequence=sequences, more=st.just(()) | tokens, root=roots, limit=st.none() | st.integers(0, 20))
    def ask(self, which, sequence, more, root, limit):
        self.check(self.store(which), root, sequence + more, limit)

    def check(self, store, root, question, limit):
        for _ in range(1000):  # each round costs the store a block, and no test has so many
            try:
                return self.check_once(store, root, question, limit)
            except BlockError:
                assert not self.all_is_kept
        raise AssertionError("a damaged block is found again and again")

    def check_once(self, store, root, question, limit):
        known = min(self.known(root, question), len(question) if limit is None else limit)
        match = store.match(root, np.array(question), limit)
        windows = store.windows(root, np.array(question), match)
        expected = self.covered(root, question[: match.length])
        if self.all_is_kept:
            assert match.length == known
            assert united(windows) == expected
        assert match.length <= known
        assert within(united(windows), expected)
        if match.spans:
            check_restored(store, match, windows, np.array(question), root, self.slides)
        for position, checkpoint in store.checkpoints(root, np.array(question), len(question)):
            assert checkpoint.is_checkpoint
            assert (root, question[:position]) in self.chains

    # --- eviction, damage, reopening ------------------------------------------------------------------------------

    @rule(which=places, to_bytes=st.sampled_from([0, 2 * FILE_BYTES, 6 * FILE_BYTES]))
    def prune(self, which, to_bytes):
        self.all_is_kept = False
        self.store(which).prune(to_bytes=to_bytes)

    @rule()
    def reopen(self):
        for store in self.stores:
            store.close()
        if self.folder is None:
            self.chains.clear()
            self.windows.clear()
            self.named.clear()
            self.all_is_kept = self.is_roomy
        self.stores = [PrefixStore(self.folder, **self.settings)]
        if self.folder is not None:
            assert self.stores[0].verify(repair=True).ok
            assert_sound(self.stores[0])

    @precondition(lambda self: self.folder is not None and len(self.stores) == 1)
    @rule()
    def open_another(self):
        self.stores.append(PrefixStore(self.folder, **self.settings))

    @precondition(lambda self: self.folder is not None)
    @rule(how=st.sampled_from(["flip", *DAMAGES]), which=places, at=st.integers(-250, 1500))
    def damage_a_file(self, how, which, at):
        files = block_files(self.folder)
        if files:
            self.all_is_kept = False
            self.named.clear()
            damage(files[which % len(files)], how, at)

    @precondition(lambda self: self.folder is not None)
    @rule(how=st.sampled_from(DAMAGES), at=places)
    def lose_the_catalog(self, how, at):
        for store in self.stores:
            store.close()
        damage(self.folder / "catalog.sqlite", how, at)
        self.stores = [PrefixStore(self.folder, **self.settings)]

    # --- names ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.all_is_kept and self.chains)
    @rule(which=places, chain=places, name=st.sampled_from("ab"))
    def name_and_pin(self, which, chain, name):
        root, new = sorted(self.chains)[chain % len(self.chains)]
        record = self.store(which).name(name, root, np.array(new), pin=True)
        assert record.kept_tokens == len(new)
        assert record.own_bytes <= record.nbytes
        self.named[name] = root, new, [each for each in self.covered(root, new) if each[1] == len(new)]

    @invariant()
    def listings_tell_the_same_as_each_name(self):
        for store in getattr(self, "stores", ())[:1]:
            for listed in store.names():
                alone = store.named(listed.name)
                assert replace(listed, own_bytes=0) == replace(alone, own_bytes=0)
                assert listed.own_bytes <= alone.own_bytes  # window blocks beside shared blocks may lack

    @invariant()
    def names_can_be_restored_at_their_ends(self):
        for name, (root, new, ranges) in getattr(self, "named", {}).items():
            for store in self.stores:
                assert store.named(name).kept_tokens == len(new)
                match = store.match(root, np.array(new))
                assert match.length == len(new)
                assert within(ranges, united(store.windows(root, np.array(new), match)))

    @precondition(lambda self: self.named)
    @rule(which=places, chosen=places)
    def export_and_import(self, which, chosen):
        name, (root, new, ranges) = sorted(self.named.items())[chosen % len(self.named)]
        with tempfile.TemporaryDirectory() as folder, PrefixStore(block_size=self.size) as other:
            self.store(which).export(name, Path(folder) / "archive")
            assert other.import_(Path(folder) / "archive").kept_tokens == len(new)
            match = other.match(root, np.array(new))
            windows = other.windows(root, np.array(new), match)
            assert within(ranges, united(windows))
            assert within(united(windows), self.covered(root, new))
            check_restored(other, match, windows, np.array(new), root, self.slides)

    @precondition(lambda self: self.chains)
    @rule(which=places, chain=places, length=st.integers(1, 14))
    def forget(self, which, chain, length):
        """Forget all chains that begin with some ids; no window block of theirs is left."""
        if len(self.stores) > 1:
            self.stores.pop().close()  # it may hold blocks in RAM
        _, new = sorted(self.chains)[chain % len(self.chains)]
        gone = new[:length]
        self.all_is_kept = False
        self.store(which).forget(np.array(gone))
        names = {each.name for each in self.store(which).names()}
        self.named = {name: each for name, each in self.named.items() if name in names}
        self.chains = {(root, other) for root, other in self.chains if other[: len(gone)] != gone}
        self.windows = {
            (root, other): first for (root, other), first in self.windows.items() if other[: len(gone)] != gone
        }
        for root in (ROOT, OTHER_ROOT):
            for question in (gone, new):
                self.check(self.store(which), root, question, None)

    # --- invariants -----------------------------------------------------------------------------------------------

    @invariant()
    def budgets_are_held(self):
        for store in getattr(self, "stores", ()):
            assert bytes_in_ram(store) <= self.settings["host_budget"]
            listed = store.chains()
            assert store.usage().nbytes >= sum(chain.nbytes for chain in listed[:1])
        if getattr(self, "folder", None) is not None:
            assert bytes_on_disk(self.folder) <= self.settings["disk_budget"]
            assert leftovers(self.folder) == []

    def teardown(self):
        for store in getattr(self, "stores", ()):
            store.close()
        if getattr(self, "folder", None) is not None:
            shutil.rmtree(self.folder)


TestWindowMachine = WindowMachine.TestCase
TestWindowMachine.settings = settings(stateful_step_count=20)
