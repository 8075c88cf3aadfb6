"""A commit interrupted at any line leaves a store that loses nothing, waits for nothing and counts correctly."""

import contextlib
import itertools

import pytest

from kvtier import PrefixStore
from kvtier.store.tiers.disk.catalog.blocks import Catalog
from kvtier.store.tiers.disk.eviction import Eviction
from kvtier.store.tiers.disk.failures import Failures
from kvtier.store.tiers.disk.tier import DiskTier
from kvtier.store.tiers.disk.writes import Writes
from kvtier.store.tiers.host.ranking import Leaves, RamValuation
from kvtier.store.tiers.host.residents import Residents
from kvtier.store.tiers.host.siblings import Siblings
from kvtier.store.tiers.host.tier import HostTier
from kvtier.transfer.writer import Writer
from tests.support.interrupts import InterruptAtLine
from tests.support.stores import bytes_in_ram, commit, count, leftovers, restored_length, truth

BLOCK_BYTES = sum(page.nbytes for page in truth("ff" * 32, count(4), 0, 4))
DISK_PARTS = (DiskTier, Writes, Eviction, Failures, Catalog)
PARTS = (PrefixStore, HostTier, Residents, Leaves, Siblings, RamValuation, *DISK_PARTS, Writer)
FILES = {part.__init__.__code__.co_filename for part in PARTS}


def commit_interrupted(at, *arguments):
    """Commit with an interrupt before line number ``at``; return whether it came before the end."""
    interrupt = InterruptAtLine(at, FILES)
    with contextlib.suppress(KeyboardInterrupt), interrupt:
        commit(*arguments)
    return interrupt.came


@pytest.mark.sample(1, of="interrupted commits")  # of 4
@pytest.mark.parametrize("blocks", [0, 1, 1000], ids=lambda blocks: f"{blocks} blocks of RAM")
def test_commit_interrupted_at_any_line_can_be_repeated(tmp_path, blocks):
    """A longer tail block replaces the stored one. Each commit has its own root, as if in another store."""
    settings, tokens = {"block_size": 4, "host_budget": blocks * BLOCK_BYTES + 1}, count(7)
    with PrefixStore(tmp_path, **settings) as store:
        for at in itertools.count():
            root = f"{at:064x}"
            store.commit(root, tokens[:6], lambda *at, root=root: truth(root, tokens, *at))
            came = commit_interrupted(at, store, tokens, root)  # the first commit of this root with a manifest
            store.flush()
            assert not store._tiers.host._writing, "a block that nobody writes is never evicted"
            assert bytes_in_ram(store) <= settings["host_budget"]
            commit(store, tokens, root)
            store.flush()
            assert bytes_in_ram(store) <= settings["host_budget"]
            if not came:
                break
    assert at > 50
    with PrefixStore(tmp_path, **settings) as store:
        for root in (f"{number:064x}" for number in range(at)):
            assert restored_length(store, tokens, root) == 7
            assert (tmp_path / "roots" / f"{root}.json").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.sample(1, of="interrupted commits")
def test_commit_to_ram_interrupted_at_any_line_can_be_repeated():
    """Includes evictions, and a tail block that a longer one replaces."""
    for at in itertools.count():
        tokens = count(7)
        with PrefixStore(host_budget=3 * BLOCK_BYTES, block_size=4) as store:
            commit(store, count(8, first=100))
            commit(store, tokens[:4])
            commit(store, tokens[:6])
            came = commit_interrupted(at, store, tokens)
            assert bytes_in_ram(store) <= store._tiers.host.budget_bytes
            commit(store, tokens)
            assert restored_length(store, tokens) == 7
            assert bytes_in_ram(store) <= store._tiers.host.budget_bytes
        if not came:
            break
    assert at > 50
