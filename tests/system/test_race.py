"""Many users of one small folder at once: each gets the right bytes, together they stay within the budget, all end.

``KVTIER_RACE_TURNS`` is how many turns each of them has; ``KVTIER_SEED`` chooses which.
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
TURNS = int(os.environ.get("KVTIER_RACE_TURNS", "15"))
SEED = int(os.environ.get("KVTIER_SEED", "1"))


@pytest.mark.sample(1)  # of 3
@pytest.mark.parametrize(("who", "number"), [("processes", 8), ("threads", 16), ("hardship", 8)])
def test_a_race(tmp_path, who, number):
    arguments = f"{str(tmp_path / 'store')!r}, {number}, {TURNS}, {SEED}"
    done = run_python(
        f"from tests.support import races; races.{who}({arguments})",
        timeout_seconds=120 + 5 * TURNS,  # none of them waits for another one for ever
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weighings"] > 5
    assert 0 < found["heaviest"] <= races.SETTINGS["disk_budget"]


@pytest.mark.parametrize("what", ["forgotten", "named anew"])
def test_a_name_that_changes_while_another_process_reads_it(tmp_path, monkeypatch, what):
    """What happened last counts, although the other one has read what was before."""
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
            return replace(found, pinned=not found.pinned)  # so that the rows are not what the file seems to say

        monkeypatch.setattr(names, "_read", read_too_early)
        assert store.verify().ok
        assert names._read is read
        if what == "forgotten":
            assert store.names() == ()
        else:
            assert store.tokens_of("a").tolist() == count(6, first=100).tolist()
            assert store.named("a").pinned
