"""SavedConversation: a chat in its store, as one record and a named prefix."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtier.errors import ChangedError, ClosedError, ConfigurationError, PromptError, StoreError
from kvtier.hf.cache import TieredCache
from kvtier.hf.chat.template import Message
from kvtier.hf.chat.transcript import Segment, Transcript
from kvtier.store.chain import TokenIds
from kvtier.store.names import checked_name, checked_ttl

_log = logging.getLogger("kvtier.hf")
_LONGEST_STEM = 190  # of the name of a second copy


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is saved of a chat.

    Attributes:
        messages: its messages.
        transcript: its text and token ids; empty where they are not known.
        model: what tells one model from another, in JSON types.
        root: the root of the model; None where nothing of it is reused.
        created_at: Unix time of its first message.
    """

    messages: Sequence[Message]
    transcript: Transcript = field(default_factory=Transcript)
    model: Mapping[str, Any] = field(default_factory=dict)
    root: str | None = None
    created_at: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return {
            "created_at": self.created_at,
            "saved_at": time.time(),
            "root": self.root,
            "model": dict(self.model),
            "messages": [dict(message) for message in self.messages],
            "segments": [[s.text, list(s.ids), s.ended_text, s.ended_ids] for s in self.transcript.segments],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Conversation:
        """Return what ``to_json`` returned.

        Raises:
            ValueError: it is something else.
        """
        try:
            messages = [dict(message) for message in found["messages"]]
            segments = [_segment(*segment) for segment in found["segments"]]
            conversation = cls(
                messages, Transcript(tuple(segments)), dict(found["model"]), found["root"], found["created_at"]
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no conversation ({error!r})") from error
        if not all(isinstance(message.get("role"), str) for message in messages):
            raise ValueError("it is no conversation: a message has no role")
        return conversation


def _segment(text: Any, ids: Any, ended_text: Any, ended_ids: Any) -> Segment:
    are_ids = isinstance(ids, list) and all(type(each) is int and each >= 0 for each in ids)
    ends = ended_text is None or isinstance(ended_text, str)
    if not (isinstance(text, str) and are_ids and ends and type(ended_ids) is int and 0 <= ended_ids <= len(ids)):
        raise ValueError("it is no conversation: a segment is no text with its ids")
    return Segment(text, tuple(ids), ended_text, ended_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The tokens whose K and V a turn has kept, under ``root``, in blocks of ``block_size``."""

    root: str
    tokens: TokenIds
    block_size: int

    def is_longer_tail_of(self, other: Kept | None) -> bool:
        """Whether it differs from ``other`` at most by a longer last block: names of that then cover this, too."""
        if other is None or self.root != other.root or len(self.tokens) < len(other.tokens):
            return False
        same_blocks = len(self.tokens) // self.block_size == len(other.tokens) // self.block_size
        return same_blocks and bool((self.tokens[: len(other.tokens)] == other.tokens).all())


class SavedConversation:
    """Loads and saves one named chat; the name also names the K and V of its last turn.

    Guarantees: never ends a turn. What cannot be saved is warned about once. The chat of another process under the same
    name is not replaced: this one goes on under a new name.

    Args:
        cache: the cache of the chat.
        name: its name; None to save nothing.
        pin: never evict its K and V.
        ttl: seconds after its last use at which it is forgotten.

    Raises:
        ConfigurationError: ``name`` or ``ttl`` cannot be used.
    """

    def __init__(self, cache: TieredCache, name: str | None, pin: bool, ttl: float | None) -> None:
        self._cache = cache
        self.name = checked_name(name) if name is not None else None
        self._pin, self._ttl = pin, checked_ttl(ttl)
        self._revision: str | None = None
        self._warned = False
        self._kept: Kept | None = None
        self._named: Kept | None = None

    def load(self) -> Conversation | None:
        """Return the saved conversation; None when there is none.

        Raises:
            ConfigurationError: the name is that of a prefix that is no chat.
            StoreError: it is damaged, or cannot be read.
        """
        if self.name is None:
            return None
        saved = self._cache.store.chats.read(self.name)
        if saved is None:
            self._check_free(self.name)
            return None
        try:
            conversation = Conversation.from_json(saved.content)
        except ValueError as error:
            raise StoreError(
                f"the chat {self.name!r:.80} cannot be resumed: {error}; forget it, or use another name"
            ) from error
        self._revision = saved.revision
        return conversation

    def save(self, conversation: Conversation, *, after_turn: bool) -> None:
        """Save a conversation; ``after_turn``: and name the K and V of the last turn of the cache.

        They are named again only when a full block is new: naming writes the last block, which the next turn replaces
        by a longer one. Until ``close``, the name covers them up to there.
        """
        if self.name is None:
            return
        try:
            self._write(conversation)
            if after_turn:
                self._kept = self._kept_now()
                if self._kept is not None and not self._kept.is_longer_tail_of(self._named):
                    self._name()
        except ConfigurationError as error:
            self._warn(f"{error}; images are saved as paths or URLs, not as objects")
        except (StoreError, ClosedError) as error:
            self._warn(str(error))

    def _kept_now(self) -> Kept | None:
        try:
            root, tokens = self._cache.turns.kept_row(0)
        except PromptError as error:  # the report of the turn says why nothing was kept
            _log.debug("K and V of the chat %r are not named: %s", self.name, error)
            return None
        return Kept(root, tokens, self._cache.store.block_size)

    def _name(self) -> None:
        """Name what was kept last.

        Raises:
            StoreError: the store does not have all of it, or the disk fails.
        """
        if self.name is not None and self._kept is not None and self._kept is not self._named:
            kept = self._kept
            self._cache.store.name(self.name, kept.root, kept.tokens, pin=self._pin, ttl=self._ttl)
            self._named = kept

    def close(self) -> None:
        """Name all that was kept, unless another writer has forgotten or continued the chat; a failure is warned about.

        May be called more than once.
        """
        store = self._cache.store
        if self.name is None or store.closed:
            return
        try:
            saved = store.chats.read(self.name)
            if saved is not None and saved.revision == self._revision:
                self._name()
        except (StoreError, ConfigurationError) as error:
            self._warn(str(error))

    def _warn(self, text: str) -> None:
        if not self._warned:
            _log.warning("the chat %r is not saved, and goes on in memory: %s", self.name, text)
        self._warned = True

    def _write(self, conversation: Conversation) -> None:
        chats, content = self._cache.store.chats, conversation.to_json()
        assert self.name is not None
        try:
            self._revision = chats.write(self.name, content, after=self._revision)
        except ChangedError:
            if chats.read(self.name) is None:
                _log.warning("the chat %r was forgotten; this conversation goes on in memory alone", self.name)
                self.name = None
                return
            self._revision, before, self.name = None, self.name, self._free_name(self.name)
            self._named = None
            _log.warning(
                "the chat %r was continued elsewhere meanwhile, which stays; this one goes on as %r", before, self.name
            )
            self._revision = chats.write(self.name, content, after=None)

    def branch(self, cache: TieredCache, name: str | None) -> SavedConversation:
        """Return the saving of a branch, whose cache is ``cache``.

        Raises:
            ConfigurationError: ``name`` cannot be used, or is the name of something else.
        """
        if name is not None:
            self._check_free(checked_name(name))
        return SavedConversation(cache, name, self._pin, self._ttl)

    def _check_free(self, name: str) -> None:
        if name in self._taken():
            raise ConfigurationError(f"name={name!r:.80} is the name of something else already; pass another.")

    def _taken(self) -> set[str]:
        store = self._cache.store
        return {*store.chats.names(), *(each.name for each in store.names())}

    def _free_name(self, name: str) -> str:
        taken = self._taken()
        names = (f"{name[:_LONGEST_STEM].rstrip()} ({n})" for n in itertools.count(2))
        return next(each for each in names if each not in taken)

    def forget(self) -> None:
        """Forget the saved conversation, and its K and V as far as no other sequence uses them.

        Raises:
            StoreError: the disk fails.
        """
        store = self._cache.store
        self._revision = self._kept = self._named = None
        if self.name is not None and (
            store.chats.read(self.name) is not None or any(each.name == self.name for each in store.names())
        ):
            store.forget(self.name)
