"""Promise 3: nothing is lost and nothing is wrong after processes are killed at any moment.

``KVTIER_KILLS`` sets the number of killed processes; ``KVTIER_SEED`` chooses the moments.
"""

from __future__ import annotations

import json
import os

import pytest

from tests.support import crashes
from tests.support.stores import run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes end in other ways here")
KILLS = int(os.environ.get("KVTIER_KILLS", "20"))
SEED = int(os.environ.get("KVTIER_SEED", "1"))
SECONDS_A_KILL = 20


@pytest.mark.sample(2, of="kills and races")  # of 7
@pytest.mark.parametrize("room", crashes.BUDGETS)
def test_store_survives_processes_killed_at_random(room):
    kills = -(-KILLS // len(crashes.BUDGETS))
    with crashes.quick_folder() as place:
        done = kill(place, room, kills)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] == kills
    assert kills / 2 < found["opened"] <= kills, "most are to be killed while they work"
    assert found["words"] > found["opened"]


def kill(place, room, kills):
    return run_python(
        f"from tests.support import crashes; crashes.main({str(place)!r}, {room!r}, {kills}, {SEED})",
        timeout_seconds=60 + SECONDS_A_KILL * kills,
    )
