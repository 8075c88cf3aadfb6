"""For tests: conformance classes, a simulated accelerator, a slow tier."""

from kvtier.testing.codecs import CodecChecks
from kvtier.testing.engines import EngineChecks
from kvtier.testing.layer_memory import LayerMemoryChecks
from kvtier.testing.policies import PolicyChecks
from kvtier.testing.simulation.engine import SimulatedEngine
from kvtier.testing.simulation.mutants import Drop, Mutant, Recorder, drops
from kvtier.testing.simulation.races import RaceError, Site
from kvtier.testing.slow_tier import Link, SlowTier
from kvtier.testing.tiers import OrderedTierChecks, TierChecks

__all__ = [
    "CodecChecks",
    "Drop",
    "EngineChecks",
    "LayerMemoryChecks",
    "Link",
    "Mutant",
    "OrderedTierChecks",
    "PolicyChecks",
    "RaceError",
    "Recorder",
    "SimulatedEngine",
    "Site",
    "SlowTier",
    "TierChecks",
    "drops",
]
