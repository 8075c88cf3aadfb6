"""Many users of one small folder at once: each gets the right bytes, together they stay within the budget, all end.

``KVTIER_RACE_TURNS`` is how many turns each of them has; ``KVTIER_SEED`` chooses which.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import racekit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the workers are forked")
TURNS = int(os.environ.get("KVTIER_RACE_TURNS", "40"))
SEED = int(os.environ.get("KVTIER_SEED", "1"))


@pytest.mark.parametrize(("who", "number"), [("processes", 8), ("threads", 16)])
def test_a_race(tmp_path, who, number):
    arguments = f"{str(tmp_path / 'store')!r}, {number}, {TURNS}, {SEED}"
    done = subprocess.run(
        [sys.executable, "-c", f"import racekit; racekit.{who}({arguments})"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(racekit.__file__).parent), *sys.path]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120 + 5 * TURNS,  # none of them waits for another one for ever
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weighings"] > 5
    assert 0 < found["heaviest"] <= racekit.SETTINGS["disk_budget"]
