"""PrefixStore: prefixes that were computed once, found again to the token.

The story of this wing. A turn *matches* its tokens against the chains of its root (``match``), opens the blocks it
found (``restore``) and has their pages put where they are to lie, layer by layer, by threads. At its end it *commits*
its tokens: blocks that are not known yet are copied out of the windows into the RAM tier and written behind to the disk
tier. What came from disk is not copied to the RAM tier: the page cache of the system has it already.
A block that turns out to be damaged is discarded, warned about once, and from then on a miss.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kvtier.errors import BlockError, ClosedError, ConfigurationError
from kvtier.pages import Page
from kvtier.store.base import Block, BlockReader, Tier
from kvtier.store.chain import BlockId, TokenIds, common_run
from kvtier.store.codec import CODECS
from kvtier.store.disk import DiskTier
from kvtier.store.fork import take_part
from kvtier.store.host import HostTier
from kvtier.store.match import PrefixMatch, Span, longest_match
from kvtier.store.restore import Restore, summary
from kvtier.transfer import Readers, Writer
from kvtier.units import default_host_budget_bytes, parse_bytes

_log = logging.getLogger("kvtier.store")
DEFAULT_BLOCK_SIZE = 256
DEFAULT_DISK_BUDGET = "50GiB"


def folder_path(value: str | os.PathLike[str], argument: str) -> Path:
    """Return ``value`` as the path of a folder.

    Raises:
        ConfigurationError: it is no path, or empty, which would be the current folder; the message names ``argument``.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ConfigurationError(f"{argument}={value!r} is not the path of a folder.")
    return Path(value).expanduser()


class PrefixStore:
    """Prefixes of conversations, kept in RAM and, given a path, on disk.

    Guarantees: token ids are compared on every hit; RAM and disk stay within their budgets; a disk that fails costs
    a warning and a recompute, never an exception from ``match``, ``restore`` or ``commit``. Thread-safe. Several
    processes may use one folder at once.

    Args:
        path: folder of the disk tier, created if missing; None keeps everything in RAM, for this process only.
        host_budget: bytes of RAM for blocks, e.g. ``"2GiB"``; by default a quarter of the machine's, at most 4 GiB.
        disk_budget: bytes of files, by default 50 GiB; ignored without ``path``.
        block_size: tokens of a full block.
        compression: ``"raw"``, ``"zstd"`` (about two thirds of the size for 16-bit floats), or ``"auto"``: raw, which
            restores fastest where files come from the page cache or a fast drive.
        namespace: stores with different namespaces never share a prefix.

    Raises:
        ConfigurationError: an argument cannot be used.
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        host_budget: int | str | None = None,
        disk_budget: int | str = DEFAULT_DISK_BUDGET,
        block_size: int = DEFAULT_BLOCK_SIZE,
        compression: str = "auto",
        namespace: str = "",
    ) -> None:
        if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
            raise ConfigurationError(f"block_size={block_size!r} must be a whole number of tokens, 1 or more.")
        if compression not in ("auto", *CODECS):
            raise ConfigurationError(f"compression={compression!r} is unknown; pass 'auto', 'raw' or 'zstd'.")
        if not isinstance(namespace, str):
            raise ConfigurationError(f"namespace={namespace!r} must be a string.")
        host_bytes = default_host_budget_bytes() if host_budget is None else parse_bytes(host_budget, "host_budget")
        disk_bytes = parse_bytes(disk_budget, "disk_budget")
        self.block_size = block_size
        self.namespace = namespace
        self.path = folder_path(path, "path") if path is not None else None
        self._host = HostTier(host_bytes)
        codec = "raw" if compression == "auto" else compression
        self._disk = DiskTier(self.path, disk_bytes, codec) if self.path is not None else None
        self._tiers: tuple[Tier, ...] = (self._host, self._disk) if self._disk is not None else (self._host,)
        self._reading = Readers()
        self._writing = Writer()
        self._warned: set[str] = set()
        self._described: set[str] = set()
        self._lock = threading.Lock()
        self._closed = False
        _open_stores.add(self)
        take_part(self)

    def before_fork(self) -> None:
        """Wait until no thread changes anything."""
        self._lock.acquire()

    def after_fork(self, in_child: bool) -> None:
        """Go on; in a child with threads of its own and nothing queued, since its parent does what it has queued."""
        if in_child:
            self._reading, self._writing = Readers(), Writer()
        self._lock.release()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the store was closed; make a new PrefixStore (or TieredCache) to use its folder again")

    def match(self, root: str, tokens: TokenIds, limit: int | None = None) -> PrefixMatch:
        """Return the longest known prefix of ``tokens``, to the token, of at most ``limit`` tokens.

        Raises:
            ClosedError: the store was closed.
        """
        self._check_open()
        limit = len(tokens) if limit is None else min(limit, len(tokens))
        return longest_match(self._tiers, root, tokens, limit, self.block_size)

    def restore(self, rows: Sequence[Sequence[Span]]) -> Restore:
        """Open the blocks of ``rows`` (at least one span among them); ``Restore.start`` lets their pages come.

        Raises:
            BlockError: blocks cannot be used. Every one of them was found out and discarded, so a new ``match`` finds
                what is left, and one ``commit`` puts back what was lost.
            ClosedError: the store was closed.
        """
        self._check_open()
        blocks = {span.block.key: span.block for spans in rows for span in spans}
        readers: dict[str, BlockReader] = {}
        missing: dict[str, BlockError] = {}
        damaged: dict[str, BlockError] = {}
        try:
            for key, block in blocks.items():
                try:
                    reader = self._open(block)
                except BlockError as error:
                    missing[key] = damaged[key] = error
                    continue
                if reader is None:  # evicted since it was matched
                    missing[key] = BlockError(f"block {key[:12]} is gone")
                else:
                    readers[key] = reader
            if not missing and len({reader.geometry for reader in readers.values()}) > 1:
                missing = damaged = dict.fromkeys(
                    readers, BlockError("layers differ from those of the blocks beside it")
                )
            self._damaged(damaged)
            if missing:
                raise BlockError(summary(missing)) from next(iter(missing.values()))
        except BaseException:
            for reader in readers.values():
                reader.close()
            raise
        return Restore(rows, readers, self._reading, self._damaged)

    def _open(self, block: BlockId) -> BlockReader | None:
        for tier in self._tiers:
            reader = tier.open(block.key)
            if reader is None:
                continue
            if reader.id.root != block.root or not np.array_equal(reader.id.tokens, block.tokens):
                reader.close()
                raise BlockError(f"block {block.key[:12]} holds other tokens than the catalog says")
            return reader
        return None

    def _damaged(self, errors: Mapping[str, BlockError]) -> None:
        """Discard blocks, given by key with what is wrong with them, and warn of those not warned of before."""
        for key in errors:
            for tier in self._tiers:
                tier.discard(key)
        with self._lock:
            news = {key: error for key, error in errors.items() if key not in self._warned}
            self._warned.update(news)
        if len(news) == 1:
            _log.warning("a stored block cannot be used and was removed: %s; its tokens are recomputed", summary(news))
        elif news:
            _log.warning(
                "%d stored blocks cannot be used and were removed: %s; their tokens are recomputed",
                len(news),
                summary(news),
            )

    def commit(
        self,
        root: str,
        tokens: TokenIds,
        read: Callable[[int, int], tuple[Page, ...]],
        manifest: Mapping[str, Any] | None = None,
    ) -> int:
        """Keep the K and V of ``tokens``; only blocks that are not known yet are read.

        Args:
            root: what else decides K and V.
            tokens: the ids of one sequence, padding removed.
            read: returns host copies of the pages of all layers for tokens ``[start, stop)``; the store owns them.
            manifest: what ``root`` stands for, written beside the blocks.

        Returns:
            The number of tokens that were new.

        Raises:
            ClosedError: the store was closed.
        """
        self._check_open()
        if self._disk is not None and manifest is not None and root not in self._described:
            self._write_behind(partial(self._disk.describe_root, root, manifest))
            self._described.add(root)
        parent, new = root, 0
        keys: list[str] = []
        for start in range(0, len(tokens), self.block_size):
            ids = tokens[start : start + self.block_size].copy()
            block = BlockId.of(root, parent, ids)
            if not self._known(block):
                if not self._keep(Block(block, read(start, start + len(ids)))):
                    break  # its children could never be reached
                new += len(ids)
            parent = block.key
            keys.append(parent)
        self._touch(keys)
        return new

    def _touch(self, keys: Sequence[str]) -> None:
        """Note that the blocks of a chain were used now; on disk behind the caller, who need not wait for a lock."""
        self._host.touch(keys)
        if self._disk is not None and keys:
            self._write_behind(partial(self._disk.touch, keys))

    def _known(self, block: BlockId) -> bool:
        if any(block.key in tier for tier in self._tiers):
            return True
        partial = len(block.tokens) < self.block_size
        return partial and any(
            common_run(child.tokens, block.tokens) == len(block.tokens) and child.root == block.root
            for tier in self._tiers
            for child in tier.children(block.parent)
        )

    def _keep(self, block: Block) -> bool:
        disk = self._disk
        if disk is None:
            return self._put(self._host, block)
        key = block.id.key

        def write() -> None:
            try:
                self._put(disk, block)
            finally:
                self._host.written(key)

        try:
            if not self._host.put(block, writing=True):
                return self._put(disk, block)  # larger than the RAM tier: nothing to write behind from
            self._drop_shorter(self._host, block.id)
            self._write_behind(write)
        except BaseException:
            # An interrupt: whether the block is put, and queued, is unknown. Protected, it might never be evicted;
            # known, it might never be written.
            self._host.discard(key)
            raise
        return True

    def _write_behind(self, task: Callable[[], None]) -> None:
        _drain_at_the_end()
        self._writing.submit(task)

    def _put(self, tier: HostTier | DiskTier, block: Block) -> bool:
        if not tier.put(block):
            return False
        self._drop_shorter(tier, block.id)
        return True

    def _drop_shorter(self, tier: Tier, block: BlockId) -> None:
        """Forget tails that ``block`` begins with: it answers for them, now that the tier has it."""
        for child in tier.children(block.parent):
            n = len(child.tokens)
            if n < len(block.tokens) and n < self.block_size and common_run(child.tokens, block.tokens) == n:
                tier.discard(child.key)

    def flush(self) -> None:
        """Wait until everything committed so far is on disk."""
        self._writing.flush()

    def close(self) -> None:
        """Write what is queued and let go of threads and files. May be called more than once."""
        if self._closed:
            return
        self._closed = True
        self._writing.close()
        self._reading.close()
        if self._disk is not None:
            self._disk.close()

    def __enter__(self) -> PrefixStore:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_open_stores: weakref.WeakSet[PrefixStore] = weakref.WeakSet()
_drained_at_the_end = 0  # the process that has called Finalize


@atexit.register
def _drain_open_stores() -> None:
    for store in list(_open_stores):
        store.close()


def _drain_at_the_end() -> None:
    """See to it that stores are drained when this process ends: some children of multiprocessing skip ``atexit``."""
    global _drained_at_the_end
    if _drained_at_the_end != os.getpid():
        Finalize(None, _drain_open_stores, exitpriority=0)
        _drained_at_the_end = os.getpid()
