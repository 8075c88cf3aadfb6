"""EncodingCost: what a codec saves in bytes and costs in seconds, and whether it pays. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.costs.transfer import TransferSample

MARGIN = 1.25
"""How many times its seconds decoding must save. Whoever decodes is also what computes, on many machines."""
_LEAST_READING_SHARE = 0.25  # of a timed load: decoding by several threads takes less time than it was timed to take


@dataclass(frozen=True, slots=True)
class EncodingSample:
    """K and V that were encoded and decoded: ``nbytes`` of tensors became ``kept_bytes``, and again what they were."""

    nbytes: int
    kept_bytes: int
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class EncodingCost:
    """What a codec makes of K and V.

    Attributes:
        kept_share: bytes of its payloads for each byte of K and V.
        decode_bytes_per_second: how fast it decodes, in bytes of K and V.
    """

    kept_share: float
    decode_bytes_per_second: float


def encoding_cost(samples: Sequence[EncodingSample]) -> EncodingCost | None:
    """Return the cost that ``samples`` show together; None where there are none."""
    nbytes = sum(each.nbytes for each in samples)
    seconds = sum(each.decode_seconds for each in samples)
    if nbytes <= 0 or seconds <= 0:
        return None
    return EncodingCost(sum(each.kept_bytes for each in samples) / nbytes, nbytes / seconds)


def as_read(sample: TransferSample, cost: EncodingCost) -> TransferSample:
    """Return what of a timed load was reading bytes, where some of them were decoded as ``cost`` says."""
    if not sample.decoded_nbytes:
        return sample
    nbytes = sample.nbytes - sample.decoded_nbytes * (1.0 - cost.kept_share)
    seconds = sample.seconds - sample.decoded_nbytes / cost.decode_bytes_per_second
    return TransferSample(max(1, int(nbytes)), max(seconds, _LEAST_READING_SHARE * sample.seconds))


def pays(cost: EncodingCost | None, byte_seconds: float | None) -> bool:
    """Return whether encoded K and V are read and decoded sooner than others are read; as far as that is known.

    Args:
        cost: of the codec; None where it was not measured.
        byte_seconds: how long reading a byte takes; None where that was not measured.
    """
    if cost is None or byte_seconds is None or cost.kept_share >= 1.0:
        return False
    return (1.0 - cost.kept_share) * byte_seconds > MARGIN / cost.decode_bytes_per_second
