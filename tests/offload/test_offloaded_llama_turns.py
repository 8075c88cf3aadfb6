"""Random turns of a tiny Llama under budgets that leave most layers cold."""

from __future__ import annotations

from tests.support.turn_machine import SETTINGS, OffloadedTurns


class OffloadedLlamaTurns(OffloadedTurns):
    family = "llama"


TestOffloadedLlamaTurns = OffloadedLlamaTurns.TestCase
TestOffloadedLlamaTurns.settings = SETTINGS
