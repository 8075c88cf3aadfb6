"""Codecs: how K and V are encoded in files. ``base`` is the seam; one module for each codec."""

from collections.abc import Mapping
from types import MappingProxyType

from kvtier.store.format.codecs.base import Codec
from kvtier.store.format.codecs.raw import Raw
from kvtier.store.format.codecs.zstd import ExponentZstd

BUILT_IN: Mapping[str, Codec] = MappingProxyType({codec.name: codec for codec in (Raw(), ExponentZstd())})
"""The codecs that every store reads, by name."""

__all__ = ["BUILT_IN", "Codec", "ExponentZstd", "Raw"]
