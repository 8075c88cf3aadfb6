"""TransferCost: seconds to load bytes from a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]

_AGING = 0.8  # weight of a sample beside that of the next one
_RATIO_WEIGHT = 0.01  # of latency to bandwidth, beside the errors of the samples
_OTHER_SIZE = 1.2  # times a size tell latency from bandwidth
_SLOW = 2.0  # times what is expected
_SHORTEST_SECONDS = 1e-5  # a latency that counts as none


@dataclass(frozen=True, slots=True)
class TransferSample:
    """A load that was timed: bytes of K and V, and those of them that had to be decoded."""

    nbytes: int
    seconds: float
    decoded_nbytes: int = 0


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
        """Return the cost that fits ``samples``, the latest last, and this one where they say nothing.

        A link may turn slow, or stall once: so errors count by their logarithm, which outliers do not rule, and less
        the older a sample is. The best fit goes through two samples, or through one: with the ratio of this cost, or
        without latency. Only the last one counts where a slow link has brought loads of one size: the others would
        promise that twice as much comes in about the same time.
        """
        known = [each for each in samples if each.nbytes > 0 and each.seconds > 0]
        if not known:
            return self
        nbytes = np.array([each.nbytes for each in known], float)
        seconds = np.array([each.seconds for each in known])
        weights = _AGING ** np.arange(len(known))[::-1]
        scales = seconds / (self.latency_seconds + nbytes / self.bytes_per_second)
        lines = _through_two(nbytes, seconds)
        latencies = np.concatenate([self.latency_seconds * scales, lines[0], np.zeros(len(known))])
        byte_seconds = np.concatenate([scales / self.bytes_per_second, lines[1], seconds / nbytes])
        if nbytes.max() < _OTHER_SIZE * nbytes.min() and np.median(scales) > _SLOW:
            latencies, byte_seconds = np.zeros(len(known)), seconds / nbytes
        expected = latencies[:, None] + byte_seconds[:, None] * nbytes
        errors = np.abs(np.log(expected / seconds)) @ weights / weights.sum()
        ratios = (latencies + _SHORTEST_SECONDS) / byte_seconds
        own_ratio = (self.latency_seconds + _SHORTEST_SECONDS) * self.bytes_per_second
        best = int(np.argmin(errors + _RATIO_WEIGHT * np.abs(np.log(ratios / own_ratio))))
        return TransferCost(float(latencies[best]), float(1 / byte_seconds[best]))


def _through_two(nbytes: _Floats, seconds: _Floats) -> tuple[_Floats, _Floats]:
    """Return latencies and seconds a byte of the lines through any two samples, but those where one is negative."""
    first, second = np.triu_indices(len(nbytes), 1)
    more_bytes = nbytes[second] - nbytes[first]
    is_line = more_bytes != 0
    first, more_seconds = first[is_line], (seconds[second] - seconds[first])[is_line]
    byte_seconds = more_seconds / more_bytes[is_line]
    latencies = seconds[first] - nbytes[first] * byte_seconds
    is_cost = (byte_seconds > 0) & (latencies >= 0)
    return latencies[is_cost], byte_seconds[is_cost]
