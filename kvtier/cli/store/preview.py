"""Texts of stored prefixes, of those whose tokenizer is known: a few words, or all."""

from __future__ import annotations

from collections.abc import Sequence
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
_NO_TOKENS: TokenIds = np.empty(0, dtype=np.int64)


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

    def last(self, items: Sequence[_Listed]) -> list[str]:
        """Return the last few words of each item in one line, without special tokens; all are read together."""
        with_text = [item for item in items if self._vocabulary(item.root) is not None]
        admin, tokens = self._store.admin, dict[str, TokenIds]()
        try:
            tokens |= admin.last_tokens([each.prefix.name for each in with_text if each.prefix], _PREVIEW_TOKENS)
            chains = [each.chain.key for each in with_text if each.prefix is None and each.chain]
            tokens |= admin.last_tokens_of_chains(chains, _PREVIEW_TOKENS)
        except StoreError:  # the disk fails: a listing without text is better than none
            pass
        return [self.line(item.root, tokens.get(_label(item), _NO_TOKENS)) for item in items]

    def whole(self, item: _Listed) -> str:
        """Return all text in one line, without special tokens."""
        return self.line(item.root, self._tokens(item))

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

    def _tokens(self, item: _Listed) -> TokenIds:
        if self._vocabulary(item.root) is not None:
            try:
                if item.prefix is not None:
                    return self._store.tokens_of(item.prefix.name)
                if item.chain is not None:
                    return self._store.tokens_of_chain(item.chain.key)
            except (StoreError, KeyError):  # removed meanwhile
                pass
        return _NO_TOKENS


def _label(item: _Listed) -> str:
    return item.prefix.name if item.prefix is not None else item.chain.key if item.chain is not None else ""
