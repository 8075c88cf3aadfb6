"""Random turns of a tiny Gemma 3: most layers have a sliding window."""

from __future__ import annotations

from tests.support.turn_machine import SETTINGS, Turns


class GemmaTurns(Turns):
    family, layers = "gemma3", 3


TestGemmaTurns = GemmaTurns.TestCase
TestGemmaTurns.settings = SETTINGS
