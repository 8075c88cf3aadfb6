"""A state machine compares a store on disk with a model: names, pins, expiry, forgetting, kills, file loss and damage.

For each committed sequence, the machine knows whether it is *sure* to be found whole (nothing could have evicted,
expired or damaged it), and otherwise how much of it can be found at most. Forgotten and expired sequences are no longer
found; pinned ones are found whole until a file is damaged. The machine has its own clock.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from kvtier import KvtierError, PrefixStore, StoreError
from kvtier.testing.faults import Deed, Fault, Faults, FaultyFilesystem
from tests.support.crashes import accounted_bytes, assert_sound, ended, fork, quick_folder
from tests.support.stores import (
    OTHER_ROOT,
    ROOT,
    block_files,
    bytes_in_ram,
    commit,
    damage,
    leftovers,
    restored_length_at_last,
    shared,
)

UNIT = 4096
TTL = 10_000.0  # much longer than a test
NAMES = ["a", "b", "ein Gespräch / 対話 ..", "A"]

Tokens = tuple[int, ...]
Key = tuple[str, Tokens]
tokens = st.lists(st.integers(1, 3), min_size=1, max_size=12).map(tuple)
roots = st.sampled_from([ROOT, ROOT, OTHER_ROOT])
names = st.sampled_from(NAMES)


@dataclass
class Known:
    """Knowledge about a sequence: whether all of it must be found.

    ``used_at``: when all of it was certainly used; ``touched_at``: when a part of it may have been used last.
    """

    sure: bool
    used_at: float
    touched_at: float


@dataclass
class Named:
    """Knowledge about a name.

    ``whole``: it is pinned, so all of it must be found. ``gone``: its ids were forgotten after so much of it was lost
    that the ids no longer identified it.
    """

    root: str
    tokens: Tokens
    pinned: bool
    whole: bool
    ttl: float | None
    used_at: float
    touched_at: float
    gone: bool = False


class StoreMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(
        block_size=st.sampled_from([1, 3, 4]),
        host_budget=st.sampled_from([1, 2**20]),
        units=st.sampled_from([None, None, 4, 8]),
        ttl=st.sampled_from([None, TTL]),
        durability=st.sampled_from(["lazy", "full"]),
    )
    def begin(self, block_size, host_budget, units, ttl, durability):
        self.resources = ExitStack()
        self.folder = self.resources.enter_context(quick_folder()) / "store"
        self.now = self.began_at = time.time()  # the dates of files must not lie in its future
        self.settings = {
            "block_size": block_size,
            "host_budget": host_budget,
            "disk_budget": 2**30 if units is None else units * UNIT,
            "ttl": ttl,
            "durability": durability,
            "free_space_floor": 0,
            "clock": lambda: self.now,
        }
        self.roomy, self.ttl = units is None, ttl
        self.lost_files = False
        self.known: dict[Key, Known] = {}
        self.named: dict[str, Named] = {}
        self.store = PrefixStore(self.folder, **self.settings)

    # --- expectations and invariants ------------------------------------------------------------------------------

    def at_most(self, root: str, question: Tokens) -> int:
        """Return how many tokens of ``question`` may be found."""
        live = [other for (other_root, other), k in self.known.items() if other_root == root and not self.expired(k)]
        live += [each.tokens for each in self.named.values() if each.root == root and self.may_be_there(each)]
        return max((shared(question, other) for other in live), default=0)

    def at_least(self, root: str, question: Tokens) -> int:
        """Return how many tokens of ``question`` must be found."""
        sure = [other for (other_root, other), k in self.known.items() if other_root == root and k.sure]
        sure += [each.tokens for each in self.named.values() if each.root == root and each.whole]
        return max((shared(question, other) for other in sure), default=0)

    def expired(self, known: Known | Named) -> bool:
        return self.ttl is not None and self.now - known.touched_at > self.ttl

    def may_be_there(self, named: Named) -> bool:
        if named.gone:
            return False
        if named.ttl is not None and self.now - named.touched_at > named.ttl:
            return False
        return named.pinned or not self.expired(named)

    def touch(self, root: str, question: Tokens) -> None:
        """Note a possible use of all sequences that begin with the same token as ``question``."""
        for (other_root, other), known in self.known.items():
            if other_root == root and other[0] == question[0] and not self.expired(known):
                known.touched_at = self.now
        for each in self.named.values():
            if each.root == root and each.tokens[0] == question[0]:
                each.touched_at = self.now

    def doubt(self, root: str | None = None, tokens: Tokens | None = None) -> None:
        """Mark sequences (of ``root``, with the same first token as ``tokens``) as no longer sure."""
        for (other_root, other), known in self.known.items():
            if root in (None, other_root) and (tokens is None or other[0] == tokens[0]):
                known.sure = False

    def outlives(self) -> bool:
        """Return whether everything in the store survives a reopening. Otherwise some of it may be in RAM alone."""
        return self.settings["host_budget"] == 1 or (self.roomy and not self.lost_files)

    def ask(self, root: str, question: Tokens) -> int:
        """Restore ``question``; check the length of the result and every byte of it."""
        least, most = self.at_least(root, question), self.at_most(root, question)
        length = restored_length_at_last(self.store, np.array(question), root)
        assert least <= length <= most, (least, length, most)
        if length:
            self.touch(root, question)
        self.store.flush()
        return length

    @invariant()
    def budgets_are_held_and_bytes_accounted_for(self):
        if not hasattr(self, "store"):
            return
        self.store.flush()
        disk = next(tier for tier in self.store.stats().tiers if tier.tier == "disk")
        assert disk.nbytes <= self.settings["disk_budget"]
        assert accounted_bytes(self.folder) == disk.nbytes
        assert bytes_in_ram(self.store) <= self.settings["host_budget"]
        assert leftovers(self.folder) == []

    @invariant()
    def names_are_known(self):
        if not hasattr(self, "store"):
            return
        self.forget_expired_names()
        found = {each.name: each for each in self.store.names()}
        assert set(found) == set(self.named)
        for name, expected in self.named.items():
            each = found[name]
            assert (each.root, each.tokens, each.pinned) == (expected.root, len(expected.tokens), expected.pinned)
            assert 0 <= each.own_bytes <= each.nbytes
            assert 0 <= each.kept_tokens <= each.tokens
            assert each.kept_tokens == each.tokens or not expected.whole
            assert self.store.named(name) == each  # a listing reads all names at once, this one alone

    @invariant()
    def what_is_pinned_is_there(self):
        if not hasattr(self, "store"):
            return
        for each in self.named.values():
            if each.whole:
                assert self.store.match(each.root, np.array(each.tokens)).length == len(each.tokens)

    # --- turns ----------------------------------------------------------------------------------------------------

    @rule(target=sequences, new=tokens, root=roots)
    def commit(self, new, root):
        self.ask(root, new)
        commit(self.store, np.array(new), root)
        self.store.flush()
        self.known[root, new] = Known(self.roomy and self.outlives(), self.now, self.now)
        self.touch(root, new)
        self.ask(root, new)
        return root, new

    @rule(target=sequences, sequence=sequences, at=st.integers(0, 12), more=tokens)
    def commit_a_branch(self, sequence, at, more):
        root, begin = sequence
        return self.commit((begin[:at] + more)[:16], root)

    @rule(sequence=sequences, more=st.just(()) | tokens)
    def restore(self, sequence, more):
        root, begin = sequence
        self.ask(root, begin + more)

    @rule(target=sequences, sequence=sequences, more=tokens, at=st.integers(1, 40), after=st.booleans())
    def commit_and_be_killed(self, sequence, more, at, after):
        """Another process dies while it commits a sequence: the sequence may be there, and everything else is."""
        root, begin = sequence
        new = (begin + more)[:16]
        drive = FaultyFilesystem(Faults(Fault(Deed.KILL, at=at, after=after)))

        def die():
            with PrefixStore(self.folder, **self.settings, filesystem=drive) as store:
                commit(store, np.array(new), root)

        code = ended(fork(die))
        assert code in (0, -9), code
        self.reopen()
        self.known.setdefault((root, new), Known(False, self.now, self.now))
        self.touch(root, new)
        self.ask(root, new)
        return root, new

    # --- user calls -----------------------------------------------------------------------------------------------

    @rule(sequence=sequences, name=names, pin=st.booleans(), ttl=st.none() | st.just(TTL / 2))
    def name(self, sequence, name, pin, ttl):
        root, tokens = sequence
        commit(self.store, np.array(tokens), root)
        self.store.flush()
        self.known[root, tokens] = Known(self.roomy and self.outlives(), self.now, self.now)
        self.touch(root, tokens)
        old = self.named.get(name)
        try:
            found = self.store.name(name, root, np.array(tokens), pin=pin, ttl=ttl)
        except StoreError:
            assert not self.roomy
            assert self.store.match(root, np.array(tokens)).length < len(tokens)
            return
        pinned = pin or (old is not None and old.pinned)
        assert found.pinned == pinned
        assert found.tokens == len(tokens)
        whole = found.kept_tokens == len(tokens)
        assert whole or not self.roomy
        if old is not None:
            self.lost_its_name(name)
        whole_for_good = pinned and whole and self.outlives()
        self.named[name] = Named(root, tokens, pinned, whole_for_good, ttl, self.now, self.now)
        assert self.store.tokens_of(name).tolist() == list(tokens) or not whole

    @precondition(lambda self: self.named)
    @rule(data=st.data(), pin=st.booleans())
    def pin_or_unpin(self, data, pin):
        name = data.draw(st.sampled_from(sorted(self.named)))
        each = self.named[name]
        if pin:
            self.store.pin(name)
            kept = self.store.named(name).kept_tokens
            each.whole = each.whole or (kept == len(each.tokens) and self.outlives())
        else:
            self.store.unpin(name)
            each.whole = False
        each.pinned = pin

    @precondition(lambda self: self.named)
    @rule(data=st.data(), new=names)
    def rename(self, data, new):
        name = data.draw(st.sampled_from(sorted(self.named)))
        if new in self.named:
            with pytest.raises(KvtierError):
                self.store.rename(name, new)
        else:
            self.store.rename(name, new)
            self.named[new] = self.named.pop(name)

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def unname(self, data):
        name = data.draw(st.sampled_from(sorted(self.named)))
        self.store.unname(name)
        self.lost_its_name(name)

    def lost_its_name(self, name):
        each = self.named.pop(name)
        if not each.gone:
            self.known.setdefault((each.root, each.tokens), Known(False, each.used_at, each.touched_at))

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def forget_a_name(self, data):
        name = data.draw(st.sampled_from(sorted(self.named)))
        each = self.named.pop(name)
        before = accounted_bytes(self.folder)
        forgotten = self.store.forget(name)
        self.gave_back(before, forgotten)
        self.is_gone(each.root, each.tokens)

    @rule(sequence=consumes(sequences), length=st.sampled_from([None, None, 2, 5]))
    def forget_what_begins_so(self, sequence, length):
        """Forget ids with all longer sequences and all blocks that lead only there, whether named or pinned or not."""
        _, tokens = sequence
        tokens = tokens[:length]
        before = accounted_bytes(self.folder)
        kept = {each.name: self.named[each.name].tokens[: each.kept_tokens] for each in self.store.names()}
        forgotten = self.store.forget(np.array(tokens))
        self.gave_back(before, forgotten)
        found = {each.name for each in self.store.names()}
        for name, each in list(self.named.items()):  # only the remaining tokens of a name can be compared
            if kept[name][: len(tokens)] == tokens:
                assert name not in found
            if tokens[: len(each.tokens)] == each.tokens:
                each.whole = False
            each.gone = each.gone or each.tokens[: len(tokens)] == tokens
            each.whole = each.whole and not each.gone
            if name not in found and shared(kept[name], tokens) in (len(tokens), len(kept[name])):
                self.lost_its_name(name)
        for root, other in list(self.known):
            if other[: len(tokens)] == tokens:
                self.is_gone(root, other)
        for root in (ROOT, OTHER_ROOT):
            self.doubt(root, tokens)
            assert self.store.match(root, np.array(tokens)).length <= self.at_most(root, tokens) < len(tokens)

    def gave_back(self, before, forgotten):
        """The disk freed the reported bytes, or fewer if a block was in RAM only because its file was damaged."""
        freed = before - accounted_bytes(self.folder)
        assert freed == forgotten.nbytes or (self.settings["host_budget"] > 1 and freed < forgotten.nbytes)

    def is_gone(self, root, tokens):
        self.known.pop((root, tokens), None)
        self.doubt(root, tokens)
        assert self.store.match(root, np.array(tokens)).length <= self.at_most(root, tokens)

    @rule(units=st.integers(0, 6))
    def prune(self, units):
        self.doubt()
        self.lost_files = True
        self.store.prune(to_bytes=units * UNIT)
        disk = next(tier for tier in self.store.stats().tiers if tier.tier == "disk")
        assert disk.nbytes <= units * UNIT or any(each.pinned for each in self.named.values())

    @rule(seconds=st.sampled_from([1.0, 0.6 * TTL, 2 * TTL]))
    def time_goes_by(self, seconds):
        self.now += seconds
        for each in self.named.values():
            each.whole = each.whole and (each.ttl is None or self.now - each.used_at < each.ttl)
        for known in self.known.values():
            known.sure = known.sure and (self.ttl is None or self.now - known.used_at < self.ttl)
        self.forget_expired_names()
        for root, question in list(self.known):
            assert self.store.match(root, np.array(question)).length <= self.at_most(root, question)
        for key in [key for key, known in self.known.items() if self.expired(known)]:
            del self.known[key]

    def forget_expired_names(self):
        found = {each.name for each in self.store.names()}
        for name, each in list(self.named.items()):
            if each.ttl is None:
                continue
            assert name in found or self.now - each.used_at >= each.ttl, f"{name} expired early"
            assert name not in found or self.now - each.touched_at <= each.ttl, f"{name} did not expire"
            if name not in found:
                del self.named[name]
                self.is_gone(each.root, each.tokens)

    # --- reopening, damage, repair --------------------------------------------------------------------------------

    @rule()
    def reopen(self):
        self.store.close()
        self.store = PrefixStore(self.folder, **self.settings)
        self.lost_files = False
        self.is_sound()

    def is_sound(self):
        assert_sound(self.store)

    @rule(how=st.sampled_from(["flip", "cut", "empty", "delete"]), which=st.integers(0, 99), at=st.integers(-200, 2000))
    def damage_a_file(self, how, which, at):
        files = block_files(self.folder)
        if not files:
            return
        self.doubt()
        self.lost_files = True
        for each in self.named.values():
            each.whole = False
        damage(files[which % len(files)], how, at)
        report = self.store.verify()
        assert not report.ok
        assert {problem.kind for problem in report.problems} <= {"damaged", "missing", "accounting", "unreachable"}
        self.repair()

    @rule()
    def repair(self):
        report = self.store.verify(repair=True)
        assert report.ok
        assert all(problem.repaired for problem in report.problems)
        self.is_sound()

    @rule(how=st.sampled_from(["cut", "empty", "delete", "flip"]), at=st.integers(0, 99))
    def lose_the_catalog(self, how, at):
        """The files hold everything that the catalog held, except the times of use."""
        self.store.close()
        damage(self.folder / "catalog.sqlite", how, at)
        if self.ttl is not None:
            self.doubt()
        for known in [*self.known.values(), *self.named.values()]:
            known.touched_at = max(known.touched_at, time.time())  # files have their own dates
            known.used_at = min(known.used_at, self.began_at)
        self.store = PrefixStore(self.folder, **self.settings)
        if how == "flip":  # SQLite may notice only during a full check
            self.store.verify(repair=True)
            self.store.close()
            self.store = PrefixStore(self.folder, **self.settings)
        self.is_sound()

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
        if hasattr(self, "resources"):
            self.resources.close()


TestStoreMachine = pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed")(StoreMachine.TestCase)
TestStoreMachine.settings = settings(stateful_step_count=20)
