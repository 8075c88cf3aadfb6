"""StoreAdmin: management of a store by its owner, between turns. Unlike in a turn, a failing disk raises an error."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path

import numpy as np

from kvtier.errors import ConfigurationError, StoreError
from kvtier.store.block import BlockReader
from kvtier.store.chain import BlockId, TokenIds, chain_keys
from kvtier.store.commit import BlockWriter, Windows
from kvtier.store.format.archive import Archive, write_archive
from kvtier.store.format.vocabulary import Vocabulary
from kvtier.store.manage import dry_run
from kvtier.store.manage.chats import SavedChats
from kvtier.store.manage.inventory import Chain, Forgotten, Inventory
from kvtier.store.manage.stats import StoreUsage, measure
from kvtier.store.manage.texts import Texts
from kvtier.store.manage.verify import Progress, VerifyReport, verify
from kvtier.store.names import Name, NamedPrefix, checked_name, checked_ttl
from kvtier.store.tiers.stack import TierStack
from kvtier.units import parse_bytes

_TRIES = 3
_KEY = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger("kvtier.store")


class StoreAdmin:
    """Names, pins, expiry, forgetting, pruning, archives and verification of one store. Thread-safe.

    Every method but ``forget_what_is_due`` raises ``ClosedError`` when the store was closed, ``StoreError`` when the
    disk fails, and ``UnknownNameError`` when the name of a prefix does not exist.

    Args:
        path: the folder of the store; None for one in RAM.
        tiers: the tiers of the store.
        writer: puts blocks into the tiers.
        texts: the vocabularies of its roots.
        flush: waits until everything committed so far is on disk.
        check_open: raises ``ClosedError`` when the store was closed.
        clock: Unix time.

    Attributes:
        chats: conversations that were saved under names; they go with their names.
    """

    def __init__(
        self,
        path: Path | None,
        tiers: TierStack,
        writer: BlockWriter,
        texts: Texts,
        flush: Callable[[], None],
        check_open: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._path = path
        self._block_size = tiers.block_size
        self._tiers = tiers
        self._names = tiers.names
        self._inventory = Inventory(tiers)
        self.chats = SavedChats(tiers.database, tiers.opened.folder if tiers.opened is not None else None, check_open)
        self._writer = writer
        self._texts = texts
        self._flush = flush
        self._check_open = check_open
        self._clock = clock

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Run a request of the owner: a failing disk raises ``StoreError``."""
        self._check_open()
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the store in {self._path} cannot do that: {error}") from error
        finally:
            self._tiers.refresh_pins()

    def name(
        self, name: str, root: str, tokens: TokenIds, *, pin: bool = False, ttl: float | str | None = None
    ) -> NamedPrefix:
        """Give a name to a committed chain; another chain that has it loses it, and passes on pin and ttl.

        Args:
            name: 1 to 200 printable characters.
            root: the root it was committed under.
            tokens: its ids, as they were committed.
            pin: never evict its blocks, nor let them expire. False leaves a pin that the name has.
            ttl: seconds after its last use at which it is forgotten, pinned or not, or a duration, e.g. ``"30d"``; None
                leaves an existing one.

        Raises:
            ConfigurationError: ``name`` or ``ttl`` cannot be used.
            StoreError: the store lacks a part of the chain, or the disk fails.
        """
        checked_name(name)
        blocks = chain_keys(root, tokens, self._block_size)
        for _ in range(_TRIES):
            with self._asked():
                keys = self._writer.chain_of(blocks, self._block_size)
                windows = self._writer.windows_of(blocks, self._block_size)
            if not keys or len(keys) * self._block_size < len(tokens):
                raise StoreError(f"{name!r:.80} cannot name {len(tokens)} tokens of which the store does not have all")
            named = self._set_name(name, root, keys, windows, len(tokens), pin, ttl)
            if named.kept_tokens == len(tokens) and all(key in self._tiers for key in windows):
                break  # else a turn of another thread has replaced its tail block meanwhile
        return named

    def _set_name(
        self,
        name: str,
        root: str,
        keys: Sequence[str],
        windows: Sequence[str],
        tokens: int,
        pin: bool,
        ttl: float | str | None,
    ) -> NamedPrefix:
        checked_name(name)
        ttl_seconds = checked_ttl(ttl)
        with self._asked():
            before = self._names.find(name)
            if before is not None:  # a conversation is named again after each turn
                pin = pin or before.pinned
                ttl_seconds = before.ttl_seconds if ttl_seconds is None else ttl_seconds
            self._writer.write_down([*keys, *windows])
            self._flush()  # a name refers to blocks on disk
            now = self._clock()
            self._names.assign(Name(name, root, tuple(keys), tokens, bool(pin), ttl_seconds, now, tuple(windows)))
        return self.named(name)

    def names(self) -> tuple[NamedPrefix, ...]:
        """Return all named prefixes."""
        self.forget_what_is_due()
        with self._asked():
            return self._inventory.described_all(self._names.all())

    def named(self, name: str) -> NamedPrefix:
        """Return the prefix ``name``."""
        self.forget_what_is_due()
        with self._asked():
            return self._inventory.described(*self._names.details(name))

    def pin(self, name: str) -> None:
        """Never evict the blocks of ``name``, nor let them expire."""
        with self._asked():
            self._names.set_pinned(name, True)

    def unpin(self, name: str) -> None:
        """Treat the blocks of ``name`` like all other blocks again."""
        with self._asked():
            self._names.set_pinned(name, False)

    def rename(self, old: str, new: str) -> None:
        """Rename ``old``, and the chat that was saved under it, to ``new``.

        Raises:
            ConfigurationError: ``new`` cannot be a name, or exists already.
        """
        checked_name(new)
        with self._asked():
            if self._names.find(new) is not None or self.chats.read(new) is not None:
                raise ConfigurationError(f"{new!r} is the name of something else already; unname or forget that first.")
            is_named = self._names.find(old) is not None
            if not self.chats.rename(old, new) or is_named:
                self._names.rename(old, new)

    def unname(self, name: str) -> None:
        """Remove a name, and the chat that was saved under it; its blocks are kept like all other blocks."""
        with self._asked():
            if self._names.find(name) is None and self.chats.remove(name):
                return
            self._names.get(name)
            self._remove_name(name)

    def _remove_name(self, name: str) -> None:
        self.chats.remove(name)  # first: if this fails half-way, the name is still there to be removed again
        self._names.remove(name)

    def tokens_of(self, name: str, *, last: int | None = None) -> TokenIds:
        """Return the token ids of ``name``, as far as the store has them; with ``last``, at most its last so many."""
        with self._asked():
            written = self._names.get(name)
            if last is not None:
                return self._inventory.last_tokens([written], last)[name]
            blocks = self._blocks(written.keys)
        ids = np.concatenate([np.empty(0, np.int64), *(block.tokens for block in blocks)])
        return ids[: written.tokens]

    def last_tokens(self, names: Collection[str], count: int) -> dict[str, TokenIds]:
        """Return the last ``count`` token ids of each of ``names``, by name, as far as the store has them.

        All are read together. Names that do not exist are left out.
        """
        wanted = set(names)
        with self._asked():
            known = [name for name, *_ in self._names.all() if name.name in wanted]
            return self._inventory.last_tokens(known, count)

    def last_tokens_of_chains(self, keys: Collection[str], count: int) -> dict[str, TokenIds]:
        """Return the last ``count`` token ids of the chains that end with the blocks ``keys``, by key.

        All are read together. Chains that do not exist are left out.
        """
        with self._asked():
            return self._inventory.tokens_up_from(self._tiers.find_all(keys), count)

    def tokens_of_chain(self, key_prefix: str, *, last: int | None = None) -> TokenIds:
        """Return the token ids of the chain whose last block's key begins with ``key_prefix``; see ``tokens_of``.

        Raises:
            UnknownNameError: no key begins with it, or several do.
        """
        with self._asked():
            block = self._tiers.find(key_prefix) if _KEY.fullmatch(key_prefix) else None
            if last is not None and block is not None:
                return self._inventory.tokens_up_from({block.key: block}, last)[block.key]
            _, keys, tokens = self._inventory.keys_to(key_prefix)
            blocks = self._blocks(keys)
        ids = np.concatenate([np.empty(0, np.int64), *(block.tokens for block in blocks)])[:tokens]
        return ids if last is None else ids[max(0, len(ids) - last) :]

    def vocabulary(self, root: str) -> Vocabulary | None:
        """Return what turns token ids of ``root`` into text; None unless a cache with a tokenizer has used the root."""
        self._check_open()
        return self._texts.vocabulary(root)

    def _blocks(self, keys: Sequence[str]) -> list[BlockId]:
        """Return the blocks ``keys`` of a chain, up to the first that is gone."""
        here = self._tiers.find_all(keys)
        return [here[key] for key in takewhile(here.__contains__, keys)]

    def chains(self) -> tuple[Chain, ...]:
        """Return every chain that is not part of a longer one, named or not, the last used first."""
        with self._asked():
            return self._inventory.chains()

    def usage(self) -> StoreUsage:
        """Return the bytes of all blocks, by root."""
        with self._asked():
            return measure(self._tiers.entries(), self._names.blocks())

    def name_chain(
        self, key_prefix: str, name: str, *, pin: bool = False, ttl: float | str | None = None
    ) -> NamedPrefix:
        """Give a name to the chain whose last block's key begins with ``key_prefix``.

        Raises:
            UnknownNameError: no key begins with it, or several do.
            ConfigurationError: ``name`` or ``ttl`` cannot be used.
        """
        with self._asked():
            root, keys, tokens = self._inventory.keys_to(key_prefix)
            windows = self._writer.windows_of(self._blocks(keys), self._block_size)
        return self._set_name(name, root, keys, windows, tokens, pin, ttl)

    def forget(
        self, what: str | Sequence[int] | TokenIds, *, encode: Callable[[str], Sequence[int]] | None = None
    ) -> Forgotten:
        """Remove a conversation for good, from RAM and disk.

        By name: removes the name, the chat saved under it, and the blocks that no other sequence uses. By token ids:
        removes all sequences that begin with them, named and pinned ones too, except blocks that other sequences use.
        Files are deleted and the rows overwritten. Drives may keep old data, and other processes keep their blocks in
        RAM.

        Args:
            what: a name, or token ids, or a text.
            encode: turns ``what``, which is then a text, into ids, e.g. ``tokenizer.encode``.

        Raises:
            ConfigurationError: ``what`` is neither a name nor ids.
        """
        if isinstance(what, str) and encode is not None:
            what = encode(what)
        if isinstance(what, str):
            self._flush()
            with self._asked():
                return self._forget_name(what)
        try:
            tokens = np.asarray(what)
        except ValueError:
            tokens = np.empty(0)
        if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
            raise ConfigurationError("forget() takes a name, or the token ids of one sequence, e.g. a list of int.")
        self._flush()
        with self._asked():
            keys = self._inventory.holding(tokens.astype(np.int64))
            for name in self._names.of_blocks(keys):
                self._remove_name(name)
            return self._remove(keys)

    def forget_chain(self, key_prefix: str) -> Forgotten:
        """Remove the chain whose last block's key begins with ``key_prefix``, as ``forget`` does by name.

        Raises:
            UnknownNameError: no key begins with it, or several do.
        """
        self._flush()
        with self._asked():
            root, keys, _ = self._inventory.keys_to(key_prefix)
            return self._remove(self._inventory.own(keys, set()), root, keys)

    def _forget_name(self, name: str, *, in_a_turn: bool = False) -> Forgotten:
        if self._names.find(name) is None and self.chats.remove(name):
            return Forgotten(0, 0)  # a chat of which nothing was computed that could be kept
        written = self._names.get(name)
        keys = self._inventory.own([block.key for block in self._blocks(written.keys)], {name})
        self._remove_name(name)
        return self._remove(keys, written.root, written.keys, in_a_turn=in_a_turn)

    def _remove(
        self, keys: Sequence[str], root: str = "", chain: Sequence[str] = (), *, in_a_turn: bool = False
    ) -> Forgotten:
        """Remove blocks, and overwrite their rows; in a turn, overwriting is left for later, since it takes long.

        Of ``chain`` after ``root``, blocks that only lower tiers still have are removed there, except those of other
        names. So are window blocks beside removed blocks.

        Raises:
            StoreError: a lower tier could not be told, or asked for the ids of its blocks.
            OSError: the folder fails.
            sqlite3.Error: the catalog fails, or is locked.
        """
        sums = self._inventory.nbytes(keys)
        below = [key for key in chain if self._tiers.find(key) is None and not self._names.of_blocks([key])]
        unread: StoreError | None = None
        try:
            windows = self._inventory.windows_below(root, chain, {*keys, *below})
            below += [key for key in windows if not self._names.of_blocks([key])]
        except StoreError as error:
            unread = error
        untold = self._tiers.remove(keys, below)
        if self._tiers.is_durable and keys:
            if in_a_turn:
                self._tiers.database.overwrite_later()
            elif not self._tiers.database.overwrite_deleted():
                _log.warning(
                    "another process uses the catalog of %s: copies of what was removed, its token ids among them, "
                    "stay in catalog.sqlite or catalog.sqlite-wal until this store flushes, writes or is closed "
                    "after that process is done",
                    self._path,
                )
        if not in_a_turn:
            self._forget_texts()
        if untold:
            raise StoreError(f"the tier {untold[0]!r} could not be told to forget; its copies stay. Try again later.")
        if unread is not None:
            raise unread
        return Forgotten(sums["blocks"], sums["bytes"])

    def _forget_texts(self) -> None:
        """Delete the vocabularies of roots without blocks."""
        self._texts.forget_all_but({entry.root for entry in self._tiers.entries()})

    def would_forget(self, names: Sequence[str]) -> Forgotten:
        """Return what forgetting all of ``names`` would remove; nothing is changed."""
        self._flush()
        with self._asked():
            return dry_run.would_forget(self._inventory, [self._names.get(name) for name in names])

    def would_forget_chain(self, key_prefix: str) -> Forgotten:
        """Return what ``forget_chain`` would remove; nothing is changed.

        Raises:
            UnknownNameError: no key begins with it, or several do.
        """
        self._flush()
        with self._asked():
            return dry_run.would_forget_chain(self._inventory, key_prefix)

    def would_prune(self, *, to_bytes: int | str | None = None, unused_for: float | str | None = None) -> Forgotten:
        """Return what ``prune`` would remove from disk; nothing is changed.

        Raises:
            ConfigurationError: an argument cannot be used, or the store has no folder.
        """
        limit, unused_before = self._limits(to_bytes, unused_for)
        if not self._tiers.is_durable:
            raise ConfigurationError("would_prune() needs a store with a folder: it counts files.")
        self._flush()
        with self._asked():
            due = [self._names.get(name) for name in self._names.due()]
            return dry_run.would_prune(self._tiers, self._inventory, due, unused_before, limit)

    def _limits(self, to_bytes: int | str | None, unused_for: float | str | None) -> tuple[int | None, float | None]:
        """Return bytes, and the Unix time of the latest use, for arguments of ``prune``."""
        limit = None if to_bytes is None else 0 if to_bytes == 0 else parse_bytes(to_bytes, "to_bytes")
        seconds = checked_ttl(unused_for, "unused_for")
        return limit, None if seconds is None else self._clock() - seconds

    def clear(self) -> Forgotten:
        """Remove everything for good: names, chats, blocks, pinned ones too, and the descriptions of all roots."""
        self._flush()
        with self._asked():
            self.chats.clear()
            for name, *_ in self._names.all():
                self._names.remove(name.name)
            entries = sorted(self._tiers.entries(all_or_nothing=True), key=lambda entry: -entry.depth_tokens)
            try:
                return self._remove(list(dict.fromkeys(entry.key for entry in entries)))
            finally:
                self._writer.forget_manifests()
                if self._tiers.opened is not None:
                    self._tiers.opened.folder.forget_roots({entry.root for entry in self._tiers.entries()})

    def forget_what_is_due(self) -> None:
        """Forget expired names. Runs in a turn, so a failing disk raises no error."""
        try:
            due = self._names.due()
        except sqlite3.Error:
            return  # the next query warns of it
        for name in due:
            # Another process forgets it, or the next turn.
            with contextlib.suppress(KeyError, OSError, sqlite3.Error, StoreError):
                self._forget_name(name, in_a_turn=True)

    # --- archives ---------------------------------------------------------------------------------------------------

    def export(self, name: str, file: str | os.PathLike[str], *, overwrite: bool = False) -> int:
        """Write the prefix ``name`` to one safetensors file, for another store or other tools.

        A chat that was saved under the name is part of it.

        Returns:
            Bytes of the file, which only the user can read.

        Raises:
            ArchiveError: the file exists already, or cannot be written.
            BlockError: a block is damaged.
            StoreError: the store no longer has all of it, or the disk fails.
        """
        self._flush()
        with self._asked(), ExitStack() as open_blocks:
            written = self._names.get(name)
            readers: list[BlockReader] = []
            for block in self._blocks(written.keys):
                reader = self._tiers.open(block)
                if reader is None:
                    break
                open_blocks.callback(reader.close)
                reader.detach()
                readers.append(reader)
            if sum(len(reader.id.tokens) for reader in readers) < written.tokens:
                raise StoreError(f"{name!r:.80} cannot be exported: the store does not have all of it any more")
            saved = self.chats.read(name)
            manifest = self._writer.manifest(written.root)
            block_size = len(readers[0].id.tokens) if len(readers) > 1 else manifest.get("block_size", self._block_size)
            ids = np.concatenate([reader.id.tokens for reader in readers])[: written.tokens]
            windows: list[BlockReader] = []
            for key in reversed(self._writer.windows_of(chain_keys(written.root, ids, block_size), block_size)):
                window = self._tiers.find(key)
                reader = self._tiers.open(window) if window is not None else None
                if reader is None:
                    break
                open_blocks.callback(reader.close)
                reader.detach()
                windows.insert(0, reader)
            return write_archive(
                file,
                readers,
                written.tokens,
                windows=windows,
                root=written.root,
                manifest=manifest,
                block_size=block_size,
                name=name,
                chat=saved.content if saved is not None else None,
                vocabulary=self._texts.vocabulary(written.root),
                overwrite=overwrite,
            )

    def import_(
        self, file: str | os.PathLike[str], *, name: str | None = None, progress: Progress | None = None
    ) -> NamedPrefix:
        """Import a file that ``export`` wrote. The file is not trusted: it is checked whole before anything is stored.

        No check can tell whether K and V are those that the model would compute: import only from trusted sources.

        Args:
            file: the file.
            name: its name here; by default its name in the file.
            progress: called now and then with the bytes checked so far, and the total.

        Raises:
            ArchiveError: the file is damaged, missing, or no archive.
            ConfigurationError: ``name`` is needed, cannot be used, or is the name of another chain.
            StoreError: there is no room for all of it, or the disk fails.
        """
        self._check_open()
        with Archive(file) as archive:
            name = checked_name(name if name is not None else archive.name or "")
            with self._asked():
                blocks = chain_keys(archive.root, archive.tokens, archive.block_size)
                before = self._names.find(name)
                saved = self.chats.read(name)
                is_other = before is not None and (before.root, before.tokens) != (archive.root, len(archive.tokens))
                if is_other or (saved is not None and saved.content != archive.chat):
                    raise ConfigurationError(f"{name!r} is the name of something else already; give another.")
            archive.check(progress)
            states = archive.states()
            self._writer.commit(
                archive.root,
                archive.tokens,
                archive.pages,
                archive.manifest,
                archive.block_size,
                None if states is None else {len(archive.tokens): states},
                windows=Windows(((archive.window_start, len(archive.tokens)),), archive.window_pages),
                imported=True,
            )
            self._flush()
            keys = self._writer.chain_of(blocks, archive.block_size)
            windows = self._writer.windows_of(blocks, archive.block_size)
            window_blocks = sum(
                start >= archive.window_start for start in range(0, len(archive.tokens), archive.block_size)
            )
            if len(keys) < len(blocks) or len(windows) < window_blocks:
                raise StoreError(f"there was no room for all of {archive.nbytes} bytes of {os.fspath(file)}")
            if archive.chat is not None and saved is None:
                self.chats.write(name, archive.chat, after=None)
            if archive.vocabulary is not None:
                self._texts.add(archive.root, archive.vocabulary)
            return self._set_name(name, archive.root, keys, windows, len(archive.tokens), False, None)

    # --- care -------------------------------------------------------------------------------------------------------

    def prune(self, *, to_bytes: int | str | None = None, unused_for: float | str | None = None) -> Forgotten:
        """Remove expired blocks, and blocks unused for ``unused_for``; then evict down to ``to_bytes``.

        Pinned blocks stay, and files that are being read. RAM is pruned, too. The result counts the last tier.

        Args:
            to_bytes: bytes, e.g. ``"10GiB"``; 0 evicts all that may go.
            unused_for: seconds, or a duration, e.g. ``"30d"``.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        limit, unused_before = self._limits(to_bytes, unused_for)
        self._flush()
        last = self._tiers.last
        before = last.stats(0)
        self.forget_what_is_due()
        with self._asked():
            self._tiers.expire()
            if unused_before is not None:
                self._tiers.discard_unread(last.unused_since(unused_before))
            if limit is not None:
                self._tiers.shrink(limit)
            self._forget_texts()
        after = last.stats(0)
        return Forgotten(before.blocks - after.blocks, before.nbytes - after.nbytes)

    def verify(self, *, repair: bool = False, progress: Progress | None = None) -> VerifyReport:
        """Read every file, and compare files, catalog and accounting.

        Args:
            repair: fix problems where possible: damaged blocks are removed, unknown ones adopted.
            progress: called now and then with the bytes read so far, and the total.
        """
        self._flush()
        with self._asked():
            if self._tiers.opened is None:
                return VerifyReport(len(self._tiers.host), self._tiers.host.nbytes, 0.0, ())
            return verify(self._tiers.opened, repair=repair, progress=progress)
