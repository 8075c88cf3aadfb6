"""Many users share one small folder: each reads the right bytes, all keep within the budget, and all end.

``KVTIER_RACE_TURNS`` sets the number of turns per user; ``KVTIER_SEED`` chooses the turns.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from kvtier import PrefixStore
from kvtier.store.tiers.disk import names
from tests.support import races
from tests.support.stores import ROOT, commit, count, run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the workers are forked")
TURNS = int(os.environ.get("KVTIER_RACE_TURNS", "8"))
SEED = int(os.environ.get("KVTIER_SEED", "1"))


@pytest.mark.sample(2, of="kills and races")  # of 7
@pytest.mark.parametrize(("who", "number"), [("processes", 8), ("threads", 16), ("hardship", 8)])
def test_concurrent_users_read_right_bytes_within_the_disk_budget(tmp_path, who, number):
    arguments = f"{str(tmp_path / 'store')!r}, {number}, {TURNS}, {SEED}"
    done = run_python(
        f"from tests.support import races; races.{who}({arguments})",
        timeout_seconds=120 + 5 * TURNS,  # no user waits for another forever
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weighings"] > 5
    assert 0 < found["heaviest"] <= races.SETTINGS["disk_budget"]


@pytest.mark.parametrize("what", ["forgotten", "named anew"])
def test_verify_keeps_a_name_change_made_by_another_store_meanwhile(tmp_path, monkeypatch, what):
    """The latest change counts, although the verifying store has read the earlier state."""
    with PrefixStore(tmp_path, block_size=4) as store, PrefixStore(tmp_path, block_size=4) as other:
        for n in (0, 100):
            commit(store, count(6, first=n))
        store.flush()
        store.name("a", ROOT, count(6))
        read = names._read

        def read_too_early(path):
            found = read(path)
            monkeypatch.setattr(names, "_read", read)
            if what == "forgotten":
                other.forget("a")
            else:
                other.name("a", ROOT, count(6, first=100), pin=True)
            return replace(found, pinned=not found.pinned)  # so that the rows differ from the contents of the file

        monkeypatch.setattr(names, "_read", read_too_early)
        assert store.verify().ok
        assert names._read is read
        if what == "forgotten":
            assert store.names() == ()
        else:
            assert store.tokens_of("a").tolist() == count(6, first=100).tolist()
            assert store.named("a").pinned
