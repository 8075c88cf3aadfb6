"""ReadCoalescer: reads a block once when several loads need it at the same time.

A restore that reads a block alone reads it directly into its destination. Once a second restore has opened the same
block, each page that both still need is read into memory once, and copied from there to both. The memory held for later
readers is bounded; beyond that, each reader reads for itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtier.errors import BlockError
from kvtier.kv.page import Page, PageView
from kvtier.kv.spec import KVSpec
from kvtier.platform.fork_safety import Rank, take_part
from kvtier.store.block import Landing
from kvtier.store.chain import BlockId
from kvtier.store.format.block_file import BlockFile
from kvtier.store.tiers.leases import BlockLease, Leases

if TYPE_CHECKING:
    import torch

HELD_BYTES = 256 * 2**20


@dataclass(slots=True, eq=False)
class _Load:
    """One open block, and the pages that some of its readers have and others still need."""

    reader: BlockFile
    users: int = 0
    waiting: set[SharedReader] = field(default_factory=set)
    pages: dict[int, Future[Page]] = field(default_factory=dict)
    needed: dict[int, int] = field(default_factory=dict)


class ReadCoalescer:
    """The open blocks of one tier. Thread-safe.

    Args:
        leases: where each reader takes a lease on its block.
        held_bytes: upper limit for the bytes of pages held for later readers.
    """

    def __init__(self, leases: Leases, held_bytes: int = HELD_BYTES) -> None:
        self._leases = leases
        self._loads: dict[str, _Load] = {}
        self._left = held_bytes
        self._lock = threading.RLock()
        take_part(self, Rank.LOADS)

    def before_fork(self) -> None:
        """Wait until no thread changes anything."""
        self._lock.acquire()

    def after_fork(self, in_child: bool) -> None:
        """Release the lock. A child reads for itself: a read begun by its parent would never end there."""
        if in_child:
            for load in self._loads.values():
                load.pages.clear()
                load.needed.clear()
                load.waiting.clear()
            self._loads = {}
        self._lock.release()

    def open(self, block: BlockId, open_block: Callable[[], BlockFile]) -> SharedReader:
        """Return a reader of ``block``; ``open_block`` opens it if it is not open.

        Raises:
            BlockError: raised by ``open_block``.
        """
        lease = self._leases.prepare_load(block.key)
        try:
            with self._lock:
                load = self._loads.get(block.key)
                if load is not None:
                    return SharedReader(self, load, lease)
            opened = open_block()  # without the lock, so that many files open at a time
            with self._lock:
                load = self._loads.setdefault(block.key, _Load(opened))
                reader = SharedReader(self, load, lease)
            if load.reader is not opened:
                opened.close()
            return reader
        except BaseException:
            lease.end()
            raise

    def forget(self, key: str) -> None:
        """Drop the open block ``key``, whose file is about to be deleted. Later calls open it anew.

        Current readers may finish.
        """
        with self._lock:
            load = self._loads.pop(key, None)
            if load is not None:
                with contextlib.suppress(BlockError):  # already gone: its readers get an error
                    load.reader.hold()

    def enter(self, load: _Load, reader: SharedReader) -> None:
        """Count one more reader of ``load``."""
        with self._lock:
            load.users += 1
            load.waiting.add(reader)

    def leave(self, load: _Load, reader: SharedReader) -> None:
        """Stop holding pages for ``reader``."""
        with self._lock:
            if reader in load.waiting:
                load.waiting.discard(reader)
                for layer in list(load.pages):
                    if layer not in reader.taken:
                        self._taken(load, layer)

    def close(self, load: _Load, reader: SharedReader) -> None:
        """Remove a reader; the last one closes the block."""
        with self._lock:
            self.leave(load, reader)
            load.users -= 1
            last = load.users == 0
            if last and self._loads.get(reader.id.key) is load:
                del self._loads[reader.id.key]
        if last:
            load.reader.close()

    def page(self, load: _Load, reader: SharedReader, layer: int) -> Page:
        """Return a page for ``reader``; the first caller reads it."""
        with self._lock:
            future = load.pages.get(layer)
            others = sum(layer not in other.taken for other in load.waiting if other is not reader)
            nbytes = self._page_bytes(load, layer)
            mine = future is None
            if future is None:
                future = Future()
                if reader in load.waiting and others and nbytes <= self._left:
                    load.pages[layer], load.needed[layer] = future, others + 1
                    self._left -= nbytes
        if mine:
            try:
                future.set_result(load.reader.page(layer))
            except BlockError as error:
                future.set_exception(error)
            except BaseException:  # an interrupt is for this thread alone
                future.cancel()
                raise
        try:
            return future.result()
        except CancelledError:
            return load.reader.page(layer)
        finally:
            with self._lock:
                if load.pages.get(layer) is future and layer not in reader.taken and reader in load.waiting:
                    self._taken(load, layer)
                reader.taken.add(layer)

    def _taken(self, load: _Load, layer: int) -> None:
        load.needed[layer] -= 1
        if load.needed[layer] <= 0:
            del load.pages[layer], load.needed[layer]
            self._left += self._page_bytes(load, layer)

    @staticmethod
    def _page_bytes(load: _Load, layer: int) -> int:
        return load.reader.spec.layers[layer].token_bytes * len(load.reader.id.tokens)

    def shared(self, load: _Load, reader: SharedReader, layer: int) -> bool:
        """Whether ``reader`` should read ``layer`` with others; if not, it counts as read."""
        with self._lock:
            if layer in load.pages or any(layer not in o.taken for o in load.waiting if o is not reader):
                return True
            reader.taken.add(layer)
            return False


class SharedReader:
    """One restore's view of a block that others may be reading too. Holds a lease until it is closed."""

    def __init__(self, loads: ReadCoalescer, load: _Load, lease: BlockLease) -> None:
        self.id: BlockId = load.reader.id
        self.tier: str = load.reader.tier
        self.spec: KVSpec = load.reader.spec
        self.taken: set[int] = set()
        self._loads = loads
        self._load = load
        self._lease = lease
        self._closed = False
        loads.enter(load, self)

    @property
    def is_plain(self) -> bool:
        """Whether pages need no decoding."""
        return self._load.reader.is_plain

    def page(self, layer: int) -> Page:
        """Return the page of ``layer``, read only."""
        return self._loads.page(self._load, self, layer)

    def landing(self, layer: int, first: int, last: int, view: PageView, *, check: bool = True) -> Landing:
        """Prepare to put the tokens ``[first, last)`` of the page of ``layer`` into ``view``."""
        if self._loads.shared(self._load, self, layer):
            return lambda: view.take(self.page(layer), first, last)
        return self._load.reader.landing(layer, first, last, view, check=check)

    def states(self) -> torch.Tensor | None:
        """Return the states of a checkpoint; each restore reads them for itself."""
        return self._load.reader.states()

    def detach(self) -> None:
        """Stay open, but hold no pages for this reader: it reads each page itself, as often as needed."""
        self._loads.leave(self._load, self)

    def close(self) -> None:
        """End the lease. May be called more than once."""
        if not self._closed:
            self._closed = True
            self._loads.close(self._load, self)
            self._lease.end()
