"""Random turns of a tiny Gemma 3 under budgets that leave most layers cold."""

from __future__ import annotations

from tests.support.turn_machine import SETTINGS, OffloadedTurns


class OffloadedGemmaTurns(OffloadedTurns):
    family = "gemma3"


TestOffloadedGemmaTurns = OffloadedGemmaTurns.TestCase
TestOffloadedGemmaTurns.settings = SETTINGS
