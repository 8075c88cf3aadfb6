"""A state machine compares ``PrefixStore`` with a dictionary of all commits: exact lengths, bytes and budgets.

The machine keeps up to two stores on one folder (or one in RAM). While nothing is evicted or damaged, a store finds
exactly the longest prefix that the question shares with any committed sequence of the same root; afterwards it may find
less, never more. Restored bytes are compared with bytes that follow from the root and all earlier tokens.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier import PrefixStore
from tests.support.stores import (
    DAMAGES,
    DIM,
    HEADS,
    LAYERS,
    OTHER_ROOT,
    ROOT,
    block_files,
    bytes_in_ram,
    bytes_on_disk,
    commit,
    damage,
    leftovers,
    restored_length_at_last,
    shared,
)

ROOMY = 2**30
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 4
HEADER_BYTES = 1100

Tokens = tuple[int, ...]
tokens = st.lists(st.integers(1, 3), min_size=1, max_size=14).map(tuple)
roots = st.sampled_from([ROOT, ROOT, OTHER_ROOT])
places = st.integers(0, 255)
bytes_of_files = st.integers(-250, 1500)  # below 0 from the end: payloads rather than the header


class Store(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(
        on_disk=st.booleans(),
        block_size=st.sampled_from([1, 3, 4]),
        compression=st.sampled_from(["raw", "zstd"]),
        host_tokens=st.sampled_from([None, None, 3, 10]),
        disk_blocks=st.sampled_from([None, None, 3]),
    )
    def open(self, on_disk, block_size, compression, host_tokens, disk_blocks):
        self.folder = Path(tempfile.mkdtemp(prefix="kvtier-store-")) if on_disk else None
        self.settings = {
            "host_budget": ROOMY if host_tokens is None else host_tokens * TOKEN_BYTES,
            "disk_budget": ROOMY if disk_blocks is None else disk_blocks * (HEADER_BYTES + block_size * TOKEN_BYTES),
            "block_size": block_size,
            "compression": compression,
        }
        self.all_is_kept = disk_blocks is None if on_disk else host_tokens is None
        self.committed: set[tuple[str, Tokens]] = set()
        self.stores = [PrefixStore(self.folder, **self.settings)]

    def store(self, which: int) -> PrefixStore:
        return self.stores[which % len(self.stores)]

    def known(self, root: str, question: Tokens) -> int:
        return max((shared(question, other) for known, other in self.committed if known == root), default=0)

    def flush(self):
        """Write all queued blocks, because other stores find them only on disk."""
        for store in self.stores:
            store.flush()

    @rule(target=sequences, which=places, new=tokens, root=roots)
    def commit(self, which, new, root):
        known = self.known(root, new)
        self.committed.add((root, new))
        written = commit(self.store(which), np.array(new), root)
        assert 0 <= written <= len(new)
        if self.all_is_kept:
            whole_blocks = known - known % self.settings["block_size"]
            assert len(new) - known <= written <= len(new) - whole_blocks
        self.flush()
        for store in self.stores:
            self.check(store, root, new, len(new))
        return new

    @rule(target=sequences, which=places, sequence=sequences, at=places, more=tokens, root=roots)
    def commit_a_branch(self, which, sequence, at, more, root):
        """Commit a sequence that shares a prefix with an earlier one: part of a block, or whole blocks."""
        return self.commit(which, (sequence[: at % (len(sequence) + 1)] + more)[:20], root)

    @rule(which=places, sequence=sequences, more=st.just(()) | tokens, root=roots, limit=st.none() | st.integers(0, 20))
    def ask(self, which, sequence, more, root, limit):
        self.check(self.store(which), root, sequence + more, limit)

    def check(self, store, root, question, limit):
        known = self.known(root, question)
        if limit is not None:
            known = min(known, limit)
        match = store.match(root, np.array(question), limit)
        assert match.length <= known
        length = restored_length_at_last(store, np.array(question), root, limit)
        assert length <= match.length
        if self.all_is_kept:
            assert length == match.length == known
        self.check_divergence(match, root, question)

    def check_divergence(self, match, root, question):
        """The expected token was committed after the same tokens; the seen token is that of the question."""
        if match.divergence is None:
            return
        at = match.divergence.index
        assert at >= match.length
        assert match.divergence.seen == question[at] != match.divergence.expected
        expected = (*question[:at], match.divergence.expected)
        assert any(other[: at + 1] == expected for known, other in self.committed if known == root)

    @rule(damage_one=st.booleans(), how=st.sampled_from(DAMAGES), which=places, at=bytes_of_files)
    def reopen(self, damage_one, how, which, at):
        for store in self.stores:
            store.close()
            store.close()
        if self.folder is None:
            self.committed.clear()
        elif damage_one:
            self.damage_files(how, which, at, False)
        self.stores = [PrefixStore(self.folder, **self.settings)]

    @precondition(lambda self: self.folder is not None and len(self.stores) == 1)
    @rule()
    def open_another(self):
        self.stores.append(PrefixStore(self.folder, **self.settings))

    @precondition(lambda self: self.folder is not None)
    @rule(how=st.sampled_from(["flip", *DAMAGES]), which=st.none() | places, at=bytes_of_files, look=st.booleans())
    def damage_files(self, how, which, at, look):
        """Damage one file, or all of them."""
        files = block_files(self.folder)
        if files and which is not None:
            files = [files[which % len(files)]]
        self.all_is_kept = self.all_is_kept and not files
        for path in files:
            damage(path, how, at)
        if look:  # through a store that holds nothing in RAM yet
            with PrefixStore(self.folder, **self.settings) as store:
                for root, sequence in sorted(self.committed):
                    self.check(store, root, sequence, None)

    @precondition(lambda self: self.folder is not None)
    @rule(how=st.sampled_from(DAMAGES), at=places)
    def lose_the_catalog(self, how, at):
        """The block files hold everything that the catalog held."""
        for store in self.stores:
            store.close()
        damage(self.folder / "catalog.sqlite", how, at)
        self.stores = [PrefixStore(self.folder, **self.settings)]

    @invariant()
    def budgets_are_held(self):
        for store in self.stores:
            assert bytes_in_ram(store) <= self.settings["host_budget"]
        if self.folder is not None:
            assert bytes_on_disk(self.folder) <= self.settings["disk_budget"]
            assert leftovers(self.folder) == []

    def teardown(self):
        if hasattr(self, "stores"):
            for store in self.stores:
                store.close()
            if self.folder is not None:
                shutil.rmtree(self.folder)


TestStore = Store.TestCase
TestStore.settings = settings(stateful_step_count=25)
