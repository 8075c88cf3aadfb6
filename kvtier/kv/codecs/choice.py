"""Choice of a codec by an argument: a name, or an object."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvtier.errors import ConfigurationError
from kvtier.kv.codecs.base import Codec, check_codec
from kvtier.kv.codecs.raw import Raw
from kvtier.kv.codecs.zstd import ExponentZstd

BUILT_IN: Mapping[str, Codec] = MappingProxyType({codec.name: codec for codec in (Raw(), ExponentZstd())})
"""The codecs that every store reads, by name."""


def chosen_codec(value: str | Codec, argument: str, auto: str | None = None) -> Codec:
    """Return the codec for ``value``, a name or a codec, which was passed as ``argument``.

    ``auto`` is the name that ``"auto"`` stands for; None where that is no choice.

    Raises:
        ConfigurationError: the name is unknown, or the object is no codec or has the name of a built-in one.
    """
    if hasattr(value, "encode") and not isinstance(value, (str, bytes)):
        codec = check_codec(value, argument)
        if codec.name in BUILT_IN and type(codec) is not type(BUILT_IN[codec.name]):
            raise ConfigurationError(f"{argument}={type(codec).__name__} has the name of another codec: {codec.name}")
        return codec
    by_name = BUILT_IN if auto is None else {"auto": BUILT_IN[auto], **BUILT_IN}
    if not isinstance(value, str) or value not in by_name:
        known = ", ".join(map(repr, by_name))
        raise ConfigurationError(f"{argument}={value!r} is unknown; pass {known}, or a codec.")
    return by_name[value]
