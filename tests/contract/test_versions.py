"""The tested versions of transformers match the pinned, promised and requested ones."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from reliance import INSTALLED, version_of

from kvtier.hf.compat import names

ROOT = Path(__file__).parents[2]


def test_newest_tested_transformers_is_the_pinned_version():
    pinned = re.search(r"^transformers==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert version_of(pinned.group(1)) == names.NEWEST_TESTED
    previous = re.search(r"PREVIOUS_TRANSFORMERS := ([\d.]+)", (ROOT / "Makefile").read_text())
    assert version_of(previous.group(1)) < names.NEWEST_TESTED


def test_oldest_tested_transformers_is_the_lower_bound_of_the_requirement():
    promised = re.search(r'"transformers>=([\d.]+),<(\d+)"', (ROOT / "pyproject.toml").read_text())
    tried = re.search(r"LOWEST_TRANSFORMERS := ([\d.]+)", (ROOT / "Makefile").read_text())
    assert promised.group(1) == tried.group(1)
    assert version_of(promised.group(1)) == names.OLDEST_TESTED
    assert version_of(promised.group(1)) <= INSTALLED < (int(promised.group(2)), 0)


@pytest.mark.skipif("KVTIER_TRANSFORMERS" not in os.environ, reason="no version was asked for")
def test_installed_transformers_is_the_requested_version():
    assert version_of(os.environ["KVTIER_TRANSFORMERS"]) == INSTALLED
