"""A custom tier: blocks in a dict, behind requests that are counted and may be slow, fail or never answer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from functools import partial

from kvtier.kv.spec import KVSpec
from kvtier.store.block import Entry
from kvtier.store.tiers.base import Presence, PutResult, TierStats, answered


class DictReader:
    tier = "dict"
    is_plain = True

    def __init__(self, block):
        self.id = block.id
        self.spec = KVSpec(tuple(page.spec for page in block.pages))
        self._block = block
        self.closed = False

    def page(self, layer):
        return self._block.pages[layer]

    def landing(self, layer, first, last, view, *, check=True):
        return partial(view.take, self._block.pages[layer], first, last)

    def states(self):
        return self._block.states

    def detach(self):
        pass

    def close(self):
        self.closed = True


class DictTier:
    """Every question is one request, for any number of blocks; ``requests`` records them.

    ``answer`` is called for every request that a turn waits for: it may raise, or return a future that never ends.
    """

    name = "dict"

    def __init__(self, answer=answered):
        self.blocks = OrderedDict()
        self.requests = []
        self.readers = []
        self.answer = answer
        self.closed = 0
        self._lock = threading.Lock()

    def presence(self, keys):
        self.requests.append(("presence", len(keys)))
        with self._lock:
            return self.answer([Presence.PRESENT if key in self.blocks else Presence.ABSENT for key in keys])

    def open_all(self, blocks):
        self.requests.append(("open_all", len(blocks)))
        futures = []
        for block in blocks:
            with self._lock:
                found = self.blocks.get(block.key)
            reader = DictReader(found) if found is not None else None
            self.readers += [reader] * (reader is not None)
            futures.append(self.answer(reader))
        return futures

    def put(self, block):
        self.requests.append(("put", 1))
        with self._lock:
            self.blocks.setdefault(block.id.key, block)
        return PutResult.KEPT

    def discard_all(self, keys):
        with self._lock:
            for key in keys:
                self.blocks.pop(key, None)

    def touch(self, keys, hits):
        with self._lock:
            for key in keys:
                if key in self.blocks:
                    self.blocks.move_to_end(key)

    def entries(self):
        with self._lock:
            return [
                Entry(
                    key, block.id.parent, block.id.root, len(block.id.tokens), block.depth_tokens, block.nbytes,
                    children=0, uses=0, hits=0, used_at=0.0, pinned=False, is_window=block.id.is_window,
                )
                for key, block in self.blocks.items()
            ]  # fmt: skip

    def shrink(self, to_bytes):
        with self._lock:
            while self.blocks and sum(block.nbytes for block in self.blocks.values()) > to_bytes:
                self.blocks.popitem(last=False)

    def stats(self, hits):
        with self._lock:
            nbytes = sum(block.nbytes for block in self.blocks.values())
            return TierStats(self.name, nbytes=nbytes, blocks=len(self.blocks), hits=hits)

    def flush(self):
        self.requests.append(("flush", 1))

    def close(self):
        self.closed += 1


class Never(Future):
    """A future that never ends. ``waited_seconds`` records the length of each wait."""

    waited_seconds = []  # noqa: RUF012  of all

    def __init__(self, value):
        super().__init__()

    def result(self, timeout=None):
        self.waited_seconds.append(timeout)
        return super().result(0)
