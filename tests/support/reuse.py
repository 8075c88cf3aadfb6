"""``reuse_off``: marks tests in which reuse is off for a reason that lasts, of which kvtier warns."""

from __future__ import annotations

import pytest

reuse_off = pytest.mark.filterwarnings("ignore::kvtier.errors.ReuseWarning")
states_alone_off = pytest.mark.filterwarnings("ignore:.*for a cache of states alone:kvtier.errors.ReuseWarning")
"""Marks tests of models of states alone, which transformers before 5.21 does not let reuse anything."""
