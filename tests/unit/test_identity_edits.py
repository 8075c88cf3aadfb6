"""Whatever decides K and V changes the root or turns reuse off; what does not is the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from identity_edits import TABLES, say, say_all, small

CASES = [
    pytest.param(make, name, name in off, id=f"{number} {name}")
    for number, (table, off, make) in enumerate(TABLES)
    for name in table
]


@pytest.mark.parametrize(("make", "name", "is_off"), CASES)
def test_what_decides_changes_the_root(make, name, is_off):
    said = []
    for variant in (1, 1, 2, 1):
        with make(name, variant) as model:
            said.append(say(model))
            assert say(model) == said[-1], "a second turn of the same model"
    assert [one.startswith("off: ") for one in said] == [is_off] * 4, said
    if not is_off:
        assert said[0] == said[1] == said[3] != said[2]
    assert say(small()) == say(small())


@pytest.mark.parametrize("seed", ["1", "2"])
def test_other_processes_say_the_same(seed):
    """They order sets otherwise, and have other addresses."""
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    program = "import identity_edits; identity_edits.main()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    there, here = json.loads(done.stdout.splitlines()[-1]), say_all()
    assert there.keys() == here.keys()
    assert [name for name in here if here[name] != there[name]] == []
