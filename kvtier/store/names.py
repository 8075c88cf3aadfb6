"""Names of prefixes, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvtier.errors import ConfigurationError
from kvtier.units import parse_seconds, size

_LONGEST = 200


@dataclass(frozen=True, slots=True)
class NamedPrefix:
    """A prefix or conversation that has a name.

    Attributes:
        name: its name.
        root: identifies everything else that decides its K and V.
        tokens: how many tokens it has.
        kept_tokens: of those, how many the store still has; all of them while it is pinned.
        nbytes: bytes on disk (in RAM for a store without folder) of its blocks, shared ones included.
        own_bytes: of those, bytes that no other sequence uses: ``forget`` would free them.
        tokens_by_tier: ``kept_tokens`` by the fastest tier that has them: ``host``, ``disk``.
        created_at: Unix time at which it was named.
        used_at: Unix time of its last use.
        hits: how often its last kept block was reused.
        pinned: whether it is never evicted.
        expires_at: Unix time at which it is forgotten unless used before; None for never.
    """

    name: str
    root: str
    tokens: int
    kept_tokens: int
    nbytes: int
    own_bytes: int
    tokens_by_tier: Mapping[str, int]
    created_at: float
    used_at: float
    hits: int
    pinned: bool
    expires_at: float | None

    def __repr__(self) -> str:
        """Return the name, how much of it the store has, and whether it stays."""
        stays = ", pinned" if self.pinned else ", expires" if self.expires_at is not None else ""
        tokens = f"{self.kept_tokens:,} of {self.tokens:,} tokens"
        return f"<NamedPrefix {self.name!r}: {tokens}, {size(self.nbytes)}{stays}>"


@dataclass(frozen=True, slots=True)
class Name:
    """The record of a name.

    Attributes:
        name: the name of the chain.
        root: the root of the chain.
        keys: the keys of its blocks, in order.
        windows: the keys of the window blocks that end it, in order and without a hole between them.
        tokens: how many tokens it has; its last block may have more.
        pinned: whether its blocks are never evicted.
        ttl_seconds: time without use after which it is forgotten; None for never.
        created_at: Unix time at which it was named.
    """

    name: str
    root: str
    keys: tuple[str, ...]
    tokens: int
    pinned: bool
    ttl_seconds: float | None
    created_at: float
    windows: tuple[str, ...] = ()


def checked_name(name: object) -> str:
    """Return ``name`` if it is valid.

    Raises:
        ConfigurationError: it is no string of 1 to 200 printable characters that neither begins nor ends with a space.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST or not name.isprintable() or name != name.strip():
        raise ConfigurationError(
            f"name={name!r:.80} cannot be a name; pass 1 to {_LONGEST} printable characters without spaces around them."
        )
    return name


def checked_ttl(ttl: float | str | None, argument: str = "ttl") -> float | None:
    """Return ``ttl`` in seconds: a number of seconds, or a duration, e.g. ``"30d"``; None stays None.

    Raises:
        ConfigurationError: it is no duration above 0, or one of more than 30,000 years; the message names ``argument``.
    """
    return None if ttl is None else parse_seconds(ttl, argument)
