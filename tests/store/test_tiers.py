"""``TierChecks``, which every tier passes, for the host tier, the disk tier and a custom tier with latency.

The first two also pass ``OrderedTierChecks``.
"""

from __future__ import annotations

import pytest

from kvtier.store.eviction import Adaptive
from kvtier.store.tiers.host.tier import HostTier
from kvtier.testing import OrderedTierChecks, TierChecks
from tests.store.test_disk import opened
from tests.support.dict_tier import DictTier


class TestHostTier(OrderedTierChecks):
    @pytest.fixture
    def tier(self):
        return HostTier(2**20, Adaptive(), lambda: 0.0)


class TestDiskTier(OrderedTierChecks):
    @pytest.fixture
    def tier(self, tmp_path):
        with opened(tmp_path) as tier:
            yield tier


class TestDictTier(TierChecks):
    @pytest.fixture
    def tier(self):
        tier = DictTier()
        yield tier
        tier.close()
