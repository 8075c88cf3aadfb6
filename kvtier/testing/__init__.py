"""For tests: a simulated engine that finds unordered copies, mutants that prove it, and checks for engine authors."""

from kvtier.testing.engines import EngineChecks
from kvtier.testing.mutants import Drop, Mutant, Recorder, drops
from kvtier.testing.races import RaceError
from kvtier.testing.simulated import SimulatedEngine
from kvtier.testing.sites import Site

__all__ = ["Drop", "EngineChecks", "Mutant", "RaceError", "Recorder", "SimulatedEngine", "Site", "drops"]
