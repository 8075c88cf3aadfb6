"""Samples: a run takes a few cases of a test with many slow cases; a full run takes all.

``@pytest.mark.sample(n)`` marks such a test; ``sample(n, of="…")`` takes n cases of all tests with that word together.
Every run takes the same cases, so that a change does not fail because of another change. ``KVTIER_SAMPLE=all`` takes
all cases, ``KVTIER_SAMPLE=<word>`` takes others. Cases named on the command line always run.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest

VARIABLE = "KVTIER_SAMPLE"
_USUAL = "fa86a1d"  # any word works


def seed() -> str:
    """Return the word that decides which cases run."""
    return os.environ.get(VARIABLE, _USUAL)


def some(population: Sequence[Any], count: int, name: str) -> list[Any]:
    """Return ``count`` elements, the same in every run, or all in a full run. ``name`` says what they are for."""
    if seed() == "all" or count >= len(population):
        return list(population)
    return random.Random(f"{seed()} {name}").sample(list(population), count)


def take_samples(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Remove the cases of ``items`` that are not in the sample."""
    if seed() == "all" or any("::" in each for each in config.args) or config.option.keyword:
        return
    cases: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        mark = item.get_closest_marker("sample")
        if mark is not None:
            cases[mark.kwargs.get("of", item.nodeid.partition("[")[0])].append(item)
    left_out: set[pytest.Item] = set()
    for name, found in cases.items():
        (count,) = found[0].get_closest_marker("sample").args
        left_out.update(random.Random(f"{seed()} {name}").sample(found, max(0, len(found) - count)))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
