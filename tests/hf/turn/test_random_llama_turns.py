"""Random turns of a tiny Llama: every layer has full attention."""

from __future__ import annotations

from tests.support.turn_machine import SETTINGS, Turns


class LlamaTurns(Turns):
    family, layers = "llama", 2


TestLlamaTurns = LlamaTurns.TestCase
TestLlamaTurns.settings = SETTINGS
