"""PrefixStore: prefixes that were computed once, found again to the token.

The story of this wing. A turn *matches* its tokens against the chains of its root (``match``), *opens* the blocks it
found (``restore``) and receives their pages layer by layer, read ahead by threads. At its end it *commits* its tokens:
blocks that are not known yet are copied out of the windows into the RAM tier and written behind to the disk tier.
A block that turns out to be damaged is discarded, warned about once, and from then on a miss.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kvtier.errors import BlockError, ClosedError, ConfigurationError, RestoreError
from kvtier.report import Divergence
from kvtier.store.base import Block, BlockReader, Page, Tier
from kvtier.store.chain import BlockId, TokenIds, common_run
from kvtier.store.codec import CODECS
from kvtier.store.disk import DiskTier
from kvtier.store.host import HostTier
from kvtier.transfer import Readers, Writer
from kvtier.units import default_host_budget_bytes, parse_bytes

_log = logging.getLogger("kvtier.store")
DEFAULT_BLOCK_SIZE = 256
DEFAULT_DISK_BUDGET = "50GiB"


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The first ``used`` tokens of a block, standing at ``start`` of a sequence."""

    block: BlockId
    start: int
    used: int


@dataclass(frozen=True, slots=True, eq=False)
class PrefixMatch:
    """The longest known prefix of a sequence."""

    spans: tuple[Span, ...]
    divergence: Divergence | None

    @property
    def length(self) -> int:
        """Tokens matched."""
        return self.spans[-1].start + self.spans[-1].used if self.spans else 0


@dataclass(frozen=True, slots=True, eq=False)
class PlacedPage:
    """A page and the tokens ``[start, stop)`` of the sequence it stands for, already cut to them."""

    start: int
    stop: int
    page: Page


class Restore:
    """The pages of some matches, arriving layer by layer.

    Pages on disk are read ahead, one task a layer, in layer order; pages in RAM are there at once. Each block is read
    once, however many rows use it. ``close`` gives back files; pages already returned stay valid.
    """

    def __init__(self, store: PrefixStore, matches: Sequence[PrefixMatch], readers: Mapping[str, BlockReader]) -> None:
        self.geometry = next(iter(readers.values())).geometry
        self._store = store
        self._matches = matches
        self._readers = readers
        self._on_disk = [reader for reader in readers.values() if reader.tier != "host"]
        self._layers: list[Future[dict[str, Page]]] = []
        self._closed = False

    def start(self) -> None:
        """Begin to read ahead."""
        if self._on_disk:
            layers = range(len(self.geometry.layers))
            self._layers = [self._store._reading.submit(partial(self._read, i)) for i in layers]

    def _read(self, layer: int) -> dict[str, Page]:
        pages = {}
        for reader in self._on_disk:
            try:
                pages[reader.id.key] = reader.page(layer)
            except BlockError as error:
                self._store._damaged(reader.id.key, error)
                raise RestoreError(str(error)) from error
        return pages

    def tier(self, key: str) -> str:
        """Return where a block comes from: ``host`` or ``disk``."""
        return self._readers[key].tier

    def pages(self, layer: int, row: int) -> list[PlacedPage]:
        """Return the pages of ``layer`` for row ``row``, waiting for those on their way.

        Raises:
            RestoreError: a page could not be read; its block was discarded.
        """
        read = self._layers[layer].result() if self._on_disk else {}
        placed = []
        for span in self._matches[row].spans:
            key = span.block.key
            page = read[key] if key in read else self._readers[key].page(layer)
            if span.used < len(span.block.tokens):
                page = Page(page.k_htd[:, : span.used], page.v_htd[:, : span.used])
            placed.append(PlacedPage(span.start, span.start + span.used, page))
        return placed

    def wait(self) -> None:
        """Wait until every page is there.

        Raises:
            RestoreError: a page could not be read; its block was discarded.
        """
        for layer in self._layers:
            layer.result()

    def finish(self) -> None:
        """Keep in RAM what was read from disk, then close. Call it when every layer has its pages."""
        if not self._closed and self._layers and all(f.done() and not f.exception() for f in self._layers):
            layers = [f.result() for f in self._layers]
            for reader in self._on_disk:
                block = Block(reader.id, tuple(layer[reader.id.key] for layer in layers))
                self._store._host.put(block)
        self.close()

    def close(self) -> None:
        """Stop reading ahead and close the files."""
        if self._closed:
            return
        self._closed = True
        for layer in self._layers:
            layer.cancel()
        for layer in self._layers:
            if not layer.cancelled():
                layer.exception()  # a task that runs still uses the files
        for reader in self._readers.values():
            reader.close()
        self._layers = []


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
        self.path = Path(path).expanduser() if path is not None else None
        self._host = HostTier(host_bytes)
        codec = "raw" if compression == "auto" else compression
        self._disk = DiskTier(self.path, disk_bytes, codec) if self.path is not None else None
        self._tiers: tuple[Tier, ...] = (self._host, self._disk) if self._disk else (self._host,)
        self._reading = Readers()
        self._writing = Writer()
        self._warned: set[str] = set()
        self._lock = threading.Lock()
        self._closed = False
        _open_stores.add(self)

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
        spans: list[Span] = []
        position, parent = 0, root
        divergence = None
        while position < limit:
            expected = tokens[position : position + self.block_size]
            block = self._next(root, parent, expected)
            if block is None:
                break
            common = common_run(block.tokens, expected)
            used = min(common, limit - position)
            if used:
                spans.append(Span(block, position, used))
            if common < len(block.tokens) and common < len(expected):
                divergence = Divergence(position + common, int(block.tokens[common]), int(expected[common]))
            if used < self.block_size:
                break
            position, parent = position + used, block.key
        if spans:
            used_keys = [span.block.key for span in spans]
            for tier in self._tiers:
                tier.touch(used_keys)
        return PrefixMatch(tuple(spans), divergence)

    def _next(self, root: str, parent: str, expected: TokenIds) -> BlockId | None:
        """Return the block after ``parent`` that shares the longest run with ``expected``."""
        if len(expected) == self.block_size:
            key = BlockId.of(root, parent, expected).key
            for tier in self._tiers:
                block = tier.find(key)
                if block is not None and block.root == root and np.array_equal(block.tokens, expected):
                    return block
        best, best_run = None, -1
        for tier in self._tiers:
            for child in tier.children(parent):
                run = common_run(child.tokens, expected)
                if child.root == root and run > best_run:
                    best, best_run = child, run
        return best

    def restore(self, matches: Sequence[PrefixMatch]) -> Restore:
        """Open the blocks of ``matches`` (at least one span among them) and begin to read their pages ahead.

        Raises:
            BlockError: a block cannot be used; it was discarded, so a new ``match`` finds what is left.
            ClosedError: the store was closed.
        """
        self._check_open()
        readers: dict[str, BlockReader] = {}
        try:
            for match in matches:
                for span in match.spans:
                    if span.block.key not in readers:
                        readers[span.block.key] = self._open(span.block)
            geometries = {reader.geometry for reader in readers.values()}
            if len(geometries) > 1:
                error = BlockError("its layers differ from those of the blocks beside it")
                for key in readers:
                    self._damaged(key, error)
                raise error
        except BaseException:
            for reader in readers.values():
                reader.close()
            raise
        restore = Restore(self, matches, readers)
        restore.start()
        return restore

    def _open(self, block: BlockId) -> BlockReader:
        for tier in self._tiers:
            try:
                reader = tier.open(block.key)
                if reader is None:
                    continue
                if reader.id.root != block.root or not np.array_equal(reader.id.tokens, block.tokens):
                    reader.close()
                    raise BlockError(f"block {block.key[:12]} holds other tokens than the catalog says")
                return reader
            except BlockError as error:
                self._damaged(block.key, error)
                raise
        raise BlockError(f"block {block.key[:12]} is gone")

    def _damaged(self, key: str, error: BlockError) -> None:
        for tier in self._tiers:
            tier.discard(key)
        with self._lock:
            first = key not in self._warned
            self._warned.add(key)
        if first:
            _log.warning("a stored block cannot be used and was removed: %s; its tokens are recomputed", error)

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
        if self._disk is not None and manifest is not None:
            self._disk.describe_root(root, manifest)
        parent, new = root, 0
        for start in range(0, len(tokens), self.block_size):
            ids = tokens[start : start + self.block_size].copy()
            block = BlockId.of(root, parent, ids)
            if not self._known(block):
                if not self._keep(Block(block, read(start, start + len(ids)))):
                    break  # its children could never be reached
                new += len(ids)
                self._drop_shorter(block)
            parent = block.key
        return new

    def _known(self, block: BlockId) -> bool:
        if any(block.key in tier for tier in self._tiers):
            return True
        partial = len(block.tokens) < self.block_size
        return partial and any(
            common_run(child.tokens, block.tokens) == len(block.tokens) and child.root == block.root
            for tier in self._tiers
            for child in tier.children(block.parent)
        )

    def _drop_shorter(self, block: BlockId) -> None:
        """Forget tails that ``block`` begins with: it answers for them."""
        for tier in self._tiers:
            for child in tier.children(block.parent):
                n = len(child.tokens)
                if n < len(block.tokens) and n < self.block_size and common_run(child.tokens, block.tokens) == n:
                    tier.discard(child.key)

    def _keep(self, block: Block) -> bool:
        disk = self._disk
        if disk is None:
            return self._host.put(block)
        if not self._host.put(block, writing=True):
            return disk.put(block)  # larger than the RAM tier: nothing to write behind from

        def write() -> None:
            try:
                disk.put(block)
            finally:
                self._host.written(block.id.key)

        self._writing.submit(write)
        return True

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


@atexit.register
def _drain_open_stores() -> None:
    for store in list(_open_stores):
        store.close()
