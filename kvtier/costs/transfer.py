"""TransferCost: seconds to load bytes from a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.costs.fit import fitted


@dataclass(frozen=True, slots=True)
class TransferSample:
    """A load that was timed."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TransferCost:
    """Seconds to load bytes: the wait for the first one, then so many in a second.

    Attributes:
        latency_seconds: until the first byte.
        bytes_per_second: from then on.
    """

    latency_seconds: float
    bytes_per_second: float

    def seconds(self, nbytes: int) -> float:
        """Return the seconds for ``nbytes``; 0 for no bytes."""
        return self.latency_seconds + nbytes / self.bytes_per_second if nbytes > 0 else 0.0

    def refined(self, samples: Sequence[TransferSample]) -> TransferCost:
        """Return the cost that fits ``samples``, and this one where they say nothing."""
        rows = [(1.0, float(each.nbytes)) for each in samples]
        prior = self.latency_seconds, 1 / self.bytes_per_second
        latency, byte_seconds = fitted(rows, [each.seconds for each in samples], prior, main=1)
        return TransferCost(latency, 1 / max(byte_seconds, 1e-12))
