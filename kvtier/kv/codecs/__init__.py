"""Codecs: how K and V are encoded in files and in cold pages. ``base`` is the seam; one module for each codec."""

from kvtier.kv.codecs.base import Codec
from kvtier.kv.codecs.choice import BUILT_IN, chosen_codec
from kvtier.kv.codecs.raw import Raw
from kvtier.kv.codecs.zstd import ExponentZstd

__all__ = ["BUILT_IN", "Codec", "ExponentZstd", "Raw", "chosen_codec"]
