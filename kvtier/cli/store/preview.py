"""Texts of stored prefixes, of those whose tokenizer is known: a few words, or all."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from kvtier.cli.store.output import plain
from kvtier.errors import StoreError
from kvtier.store import PrefixStore
from kvtier.store.chain import TokenIds
from kvtier.store.format.vocabulary import Vocabulary
from kvtier.store.manage.inventory import Chain
from kvtier.store.names import NamedPrefix

_PREVIEW_TOKENS = 32


class _Listed(Protocol):
    @property
    def prefix(self) -> NamedPrefix | None:
        """A named prefix, or None."""

    @property
    def chain(self) -> Chain | None:
        """A chain, or None."""

    @property
    def root(self) -> str:
        """Its root."""


class Previews:
    """Texts of the prefixes of one store. A prompt is untrusted: what is printed is free of control characters.

    Empty where the tokenizer of a root is not known, or tokens cannot be read.
    """

    def __init__(self, store: PrefixStore) -> None:
        self._store = store
        self._vocabularies: dict[str, Vocabulary | None] = {}

    def last(self, item: _Listed) -> str:
        """Return the last few words in one line, without special tokens."""
        return self.line(item.root, self._tokens(item, _PREVIEW_TOKENS))

    def whole(self, item: _Listed) -> str:
        """Return all text in one line, without special tokens."""
        return self.line(item.root, self._tokens(item, None))

    def line(self, root: str, tokens: TokenIds) -> str:
        """Return the text of ``tokens`` in one line, without special tokens and cut characters."""
        vocabulary = self._vocabulary(root)
        if vocabulary is None:
            return ""
        return plain(" ".join(vocabulary.text(tokens, specials=False).split())).strip("\ufffd ")

    def lines(self, root: str, tokens: TokenIds) -> str | None:
        """Return the text of ``tokens`` with its line ends and special tokens; None if it is not known."""
        vocabulary = self._vocabulary(root)
        if vocabulary is None:
            return None
        return "\n".join(plain(line.expandtabs()) for line in vocabulary.text(tokens).replace("\r\n", "\n").split("\n"))

    def _vocabulary(self, root: str) -> Vocabulary | None:
        if root not in self._vocabularies:
            self._vocabularies[root] = self._store.vocabulary(root)
        return self._vocabularies[root]

    def _tokens(self, item: _Listed, last: int | None) -> TokenIds:
        if self._vocabulary(item.root) is not None:
            try:
                if item.prefix is not None:
                    return self._store.tokens_of(item.prefix.name, last=last)
                if item.chain is not None:
                    return self._store.tokens_of_chain(item.chain.key, last=last)
            except (StoreError, KeyError):  # removed meanwhile
                pass
        return np.empty(0, dtype=np.int64)
