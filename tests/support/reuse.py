"""``reuse_off``: marks tests in which reuse is off for a reason that lasts, of which kvtier warns."""

from __future__ import annotations

import pytest

reuse_off = pytest.mark.filterwarnings("ignore::kvtier.errors.ReuseWarning")
