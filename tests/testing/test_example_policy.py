"""The example eviction policy LRU-K passes the policy checks, and both tiers follow it."""

from __future__ import annotations

import pytest

from examples.lru_k import LruK
from kvtier import PrefixStore
from kvtier.testing import PolicyChecks
from tests.support.stores import ROOT, block, count

SIZE = block(count(4)).nbytes


class TestLruK(PolicyChecks):
    @pytest.fixture(params=[1, 2, 3])
    def policy(self, request):
        return LruK(request.param)


def test_lru_k_keeps_a_prompt_used_twice_through_a_stream_of_other_prompts(tmp_path):
    def turn(store, first):
        tokens = count(4, first)
        store.commit(ROOT, tokens, lambda start, stop: block(tokens[start:stop]).pages)

    settings = {"block_size": 4, "host_budget": 3 * SIZE, "policy": LruK(2)}
    for path in (None, tmp_path):
        with PrefixStore(path, **settings, **({"disk_budget": 3 * 4096} if path else {})) as store:
            turn(store, 0)
            turn(store, 0)
            for first in range(100, 200, 10):
                turn(store, first)
                store.flush()
            assert store.match(ROOT, count(4)).length == 4
