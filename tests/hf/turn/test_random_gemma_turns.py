"""Random turns of a tiny Gemma 3: most layers have a sliding window."""

from __future__ import annotations

from kvtier.hf.turn.cost import Costs
from tests.support.turn_machine import SETTINGS, Turns


class GemmaTurns(Turns):
    family, layers = "gemma3", 3


class FewWindows(GemmaTurns):
    """Sliding layers keep K and V near few places only."""

    keeps_all_windows = False

    def new_cache(self, store):
        cache = super().new_cache(store)
        cache.turns.costs = Costs(
            window_spacing_tokens=9, window_spacing_windows=1, window_margin_tokens=0, checkpoint_worth_tokens=2
        )
        return cache


TestFewWindows = FewWindows.TestCase
TestFewWindows.settings = SETTINGS
TestGemmaTurns = GemmaTurns.TestCase
TestGemmaTurns.settings = SETTINGS
