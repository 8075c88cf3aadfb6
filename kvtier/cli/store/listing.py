"""``kvtier store ls``: which prefixes are listed, in which order, and what is told of each."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kvtier.cli.store.output import Column, parse_size, span
from kvtier.cli.store.preview import Previews
from kvtier.cli.store.roots import RootFile
from kvtier.errors import ConfigurationError
from kvtier.store import PrefixStore
from kvtier.store.manage.inventory import Chain
from kvtier.store.names import NamedPrefix
from kvtier.units import parse_seconds, size


class Order(str, Enum):
    """What a listing is sorted by: names from A to Z, the last used and the newest first, the largest first."""

    NAME = "name"
    USED = "used"
    CREATED = "created"
    SIZE = "size"
    OWN = "own"
    TOKENS = "tokens"
    HITS = "hits"
    EXPIRES = "expires"
    MODEL = "model"


@dataclass(frozen=True, slots=True)
class Item:
    """A named prefix, or a chain without a name.

    Attributes:
        prefix: the name; None for a chain.
        chain: the chain; None for a name.
        model: its model.
    """

    prefix: NamedPrefix | None
    chain: Chain | None
    model: RootFile

    @property
    def _any(self) -> NamedPrefix | Chain:
        found = self.prefix or self.chain
        assert found is not None
        return found

    @property
    def label(self) -> str:
        """Its name, or the key of a chain."""
        return self.prefix.name if self.prefix is not None else self.chain.key if self.chain is not None else ""

    @property
    def model_words(self) -> str:
        """Its model's name, class and dtype, in lower case."""
        return f"{self.model.name} {self.model.title}".casefold()

    @property
    def root(self) -> str:
        """Its root."""
        return self._any.root

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return self._any.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks."""
        return self._any.nbytes

    @property
    def own_bytes(self) -> int:
        """Bytes that nothing else uses; of a chain, all."""
        return self.prefix.own_bytes if self.prefix is not None else self._any.nbytes

    @property
    def used_at(self) -> float:
        """Unix time of its last use."""
        return self._any.used_at

    @property
    def created_at(self) -> float:
        """Unix time at which it was named; of a chain, of its last use."""
        return self.prefix.created_at if self.prefix is not None else self._any.used_at

    @property
    def expires_at(self) -> float:
        """Unix time at which it is forgotten; infinity for never."""
        found = self.prefix.expires_at if self.prefix is not None else None
        return float("inf") if found is None else found

    @property
    def hits(self) -> int:
        """How often it was reused."""
        return self._any.hits

    @property
    def pinned(self) -> bool:
        """Whether it is pinned."""
        return self.prefix is not None and self.prefix.pinned


def items(store: PrefixStore, *, unnamed: bool) -> list[Item]:
    """Return the named prefixes of a store, or its chains without a name."""
    models: dict[str, RootFile] = {}

    def model(root: str) -> RootFile:
        if root not in models:
            models[root] = RootFile.read(Path(str(store.path)), root)
        return models[root]

    if unnamed:
        return [Item(None, chain, model(chain.root)) for chain in store.chains() if not chain.names]
    return [Item(prefix, None, model(prefix.root)) for prefix in store.names()]


_SORT_KEYS: Mapping[Order, Callable[[Item], Any]] = {
    Order.NAME: lambda item: item.label,
    Order.USED: lambda item: -item.used_at,
    Order.CREATED: lambda item: -item.created_at,
    Order.SIZE: lambda item: -item.nbytes,
    Order.OWN: lambda item: -item.own_bytes,
    Order.TOKENS: lambda item: -item.tokens,
    Order.HITS: lambda item: -item.hits,
    Order.EXPIRES: lambda item: item.expires_at,
    Order.MODEL: lambda item: item.model.name,
}


def sort(found: Iterable[Item], order: Order, *, reverse: bool) -> list[Item]:
    """Return items in ``order``; equal ones by name."""
    by_name = sorted(found, key=_SORT_KEYS[Order.NAME])
    return sorted(by_name, key=_SORT_KEYS[order], reverse=reverse)


Condition = Callable[[Item, Previews], bool]
_YES, _NO = ("yes", "true", "1"), ("no", "false", "0")


def _pinned(value: str) -> Condition:
    if value.lower() not in (*_YES, *_NO):
        raise ConfigurationError(f"--filter pinned={value!r:.40} must be yes or no.")
    return lambda item, _: item.pinned == (value.lower() in _YES)


def _unused_for(value: str) -> Condition:
    before = time.time() - parse_seconds(value, "--filter unused-for")
    return lambda item, _: item.used_at <= before


def _larger(value: str) -> Condition:
    nbytes = parse_size(value, "--filter larger")
    return lambda item, _: item.nbytes > nbytes


def _smaller(value: str) -> Condition:
    nbytes = parse_size(value, "--filter smaller")
    return lambda item, _: item.nbytes < nbytes


def _words(value: str) -> Condition:
    word = value.casefold()
    return lambda item, texts: (
        word in item.label.casefold() or word in item.model_words or word in texts.whole(item).casefold()
    )


_FILTERS: Mapping[str, Callable[[str], Condition]] = {
    "name": lambda value: lambda item, _: fnmatchcase(item.label, value),
    "model": lambda value: lambda item, _: value.casefold() in item.model_words,
    "root": lambda value: lambda item, _: item.root.startswith(value.lower()),
    "text": lambda value: lambda item, texts: value.casefold() in texts.whole(item).casefold(),
    "pinned": _pinned,
    "unused-for": _unused_for,
    "larger": _larger,
    "smaller": _smaller,
}
_KEY = re.compile(r"([a-z-]+)=(.*)", re.DOTALL)


def parse_filter(text: str) -> Condition:
    """Return the test of ``KEY=VALUE``, or of a word that the name, the model or the text must contain.

    Raises:
        ConfigurationError: the key is unknown, or its value is none.
    """
    found = _KEY.fullmatch(text)
    if found is None:
        return _words(text)
    key, value = found.groups()
    if key not in _FILTERS:
        raise ConfigurationError(f"--filter {text!r:.80}: there is no {key!r}; known are {', '.join(_FILTERS)}.")
    return _FILTERS[key](value)


FILTER_KEYS = tuple(_FILTERS)

# --- what is told ----------------------------------------------------------------------------------------------------

NAME_COLUMNS = (
    Column("name", "left", folds=True),
    Column("tokens"),
    Column("kept", dispensable=6),
    Column("size"),
    Column("own", dispensable=5),
    Column("last use", dispensable=1),
    Column("age", dispensable=9),
    Column("hits", dispensable=8),
    Column("pinned", "left", dispensable=7),
    Column("expires in", dispensable=7),
    Column("model", "left", dispensable=3),
    Column("text", "left", dispensable=2, fills=True),
)
CHAIN_COLUMNS = (
    Column("key", "left"),
    Column("tokens"),
    Column("size"),
    Column("last use", dispensable=1),
    Column("hits", dispensable=4),
    Column("model", "left", dispensable=3),
    Column("text", "left", dispensable=2, fills=True),
)

FIELDS = {
    False: (
        "name",
        "root",
        "tokens",
        "kept_tokens",
        "bytes",
        "own_bytes",
        "created_unix_seconds",
        "used_unix_seconds",
        "expires_unix_seconds",
        "hits",
        "pinned",
        "model",
        "text",
    ),
    True: ("key", "root", "tokens", "bytes", "used_unix_seconds", "hits", "names", "model", "text"),
}
"""The keys of ``record`` for a name and, under True, for a chain."""


def row(item: Item, text: str, now: float) -> Sequence[str]:
    """Return the cells of an item in a table, for ``NAME_COLUMNS`` or ``CHAIN_COLUMNS``."""
    prefix, used = item.prefix, f"{span(now - item.used_at)} ago"
    if prefix is None:
        return (item.label[:12], str(item.tokens), size(item.nbytes), used, str(item.hits), item.model.name, text)
    return (
        prefix.name,
        str(prefix.tokens),
        str(prefix.kept_tokens),
        size(prefix.nbytes),
        size(prefix.own_bytes),
        used,
        span(now - prefix.created_at),
        str(prefix.hits),
        "yes" if prefix.pinned else "",
        "" if prefix.expires_at is None else span(prefix.expires_at - now),
        item.model.name,
        text,
    )


def record(item: Item, text: str) -> dict[str, Any]:
    """Return an item for programs."""
    more = {"model": item.model.name, "text": text}
    if item.prefix is not None:
        return {**name_record(item.prefix), **more}
    chain = item.chain
    assert chain is not None
    return {
        "key": chain.key,
        "root": chain.root,
        "tokens": chain.tokens,
        "bytes": chain.nbytes,
        "used_unix_seconds": chain.used_at,
        "hits": chain.hits,
        "names": list(chain.names),
        **more,
    }


def name_record(named: NamedPrefix) -> dict[str, Any]:
    """Return a named prefix for programs."""
    return {
        "name": named.name,
        "root": named.root,
        "tokens": named.tokens,
        "kept_tokens": named.kept_tokens,
        "bytes": named.nbytes,
        "own_bytes": named.own_bytes,
        "created_unix_seconds": named.created_at,
        "used_unix_seconds": named.used_at,
        "expires_unix_seconds": named.expires_at,
        "hits": named.hits,
        "pinned": named.pinned,
    }
