"""The tested versions of transformers match the pinned, promised and requested ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from reliance import INSTALLED, version_of

from kvtier.hf.compat import names
from kvtier.store.format.block_file import FORMAT_VERSION

ROOT = Path(__file__).parents[2]


def test_newest_tested_transformers_is_the_pinned_version():
    pinned = re.search(r"^transformers==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert version_of(pinned.group(1)) == names.NEWEST_TESTED
    previous = re.search(r"PREVIOUS_TRANSFORMERS := ([\d.]+)", (ROOT / "Makefile").read_text())
    assert version_of(previous.group(1)) < names.NEWEST_TESTED


def test_documentation_states_the_supported_versions():
    """README and start page name the lowest versions of pyproject.toml, and the versions that the tests run on."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    previous = re.search(r"PREVIOUS_TRANSFORMERS := ([\d.]+)", makefile).group(1)
    lowest = {
        "Python": re.search(r'requires-python = ">=([\d.]+)"', project).group(1),
        "PyTorch": re.search(r'"torch>=([\d.]+)"', project).group(1),
        "transformers": re.search(r'"transformers>=([\d.]+),', project).group(1),
    }
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/index.md")]
    stated = [
        each for page in pages for each in re.findall(r"(Python|PyTorch|transformers)\s\(?([\d.]+) or later", page)
    ]
    assert {"Python", "transformers"} <= {name for name, _ in stated}
    assert [each for each in stated if lowest[each[0]] != each[1]] == []
    tested = [each for page in pages for each in re.findall(r"tested with\s([\d.]+),\s([\d.]+)\sand\s([\d.]+\d)", page)]
    assert tested
    newest = ".".join(map(str, names.NEWEST_TESTED))
    assert all(each == (lowest["transformers"], previous, newest) for each in tested)


def test_file_format_page_describes_the_version_that_is_written():
    page = (ROOT / "docs/file-format.md").read_text(encoding="utf-8")
    assert f"This page describes format version {FORMAT_VERSION}:" in page
    assert f'{{"format_version": {FORMAT_VERSION}}}' in page


def test_oldest_tested_transformers_is_the_lower_bound_of_the_requirement():
    promised = re.search(r'"transformers>=([\d.]+),<(\d+)"', (ROOT / "pyproject.toml").read_text())
    if shutil.which("make"):  # the Makefile reads it from pyproject.toml
        tried = subprocess.run(["make", "-n", "older"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert f"KVTIER_TRANSFORMERS={promised.group(1)} " in tried
    assert version_of(promised.group(1)) == names.OLDEST_TESTED
    assert version_of(promised.group(1)) <= INSTALLED < (int(promised.group(2)), 0)


@pytest.mark.skipif("KVTIER_TRANSFORMERS" not in os.environ, reason="no version was asked for")
def test_installed_transformers_is_the_requested_version():
    assert version_of(os.environ["KVTIER_TRANSFORMERS"]) == INSTALLED
