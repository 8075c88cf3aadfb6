"""The turns of ``test_random_turns``, under budgets that leave most layers cold."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant
from test_random_turns import LONGEST, Turns

from kvtier import TieredCache
from tests.support.tiny import HEAD_DIM

LONGEST_BATCH = 6 * (LONGEST + 12)  # columns that the rows of a turn can have together, new ones included


class StreamedTurns(Turns):
    """Small budgets: whatever does not fit goes to page files."""

    layers = 5

    @initialize(share=st.sampled_from([0.55, 0.7, 0.9]))
    def choose_budget(self, share):
        self.spill = Path(tempfile.mkdtemp(prefix="kvtier-spill-"))
        token = 2 * HEAD_DIM * 4 * self.layers
        self.budget = int(share * token * LONGEST_BATCH)

    def new_cache(self, store):
        return TieredCache(store, device_budget=self.budget, spill_dir=self.spill)

    @invariant()
    def device_budgets_are_held(self):
        for cache in self.caches:
            if cache.last_turn is not None:
                assert cache.last_turn.peak_device_bytes <= self.budget

    def teardown(self):
        super().teardown()
        if hasattr(self, "spill"):
            assert not list(self.spill.glob("*/*.safetensors")), "page files were left behind"
            shutil.rmtree(self.spill)


class StreamedLlamaTurns(StreamedTurns):
    family = "llama"


class StreamedGemmaTurns(StreamedTurns):
    family = "gemma3"


_SETTINGS = settings(max_examples=max(1, settings().max_examples // 4), stateful_step_count=20)
TestStreamedLlamaTurns = StreamedLlamaTurns.TestCase
TestStreamedGemmaTurns = StreamedGemmaTurns.TestCase
TestStreamedLlamaTurns.settings = TestStreamedGemmaTurns.settings = _SETTINGS
