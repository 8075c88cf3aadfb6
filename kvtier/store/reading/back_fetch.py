"""BackFetch: reads the blocks of a load into memory from the last to the first, while a model computes the front."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from kvtier.costs.transfer import TransferSample
from kvtier.errors import BlockError
from kvtier.kv.page import Page, PageView
from kvtier.store.block import BlockReader, Landing
from kvtier.store.reading.load import LoadJob
from kvtier.transfer.threads import Readers

if TYPE_CHECKING:
    import torch


class FetchedBlock:
    """A block whose pages are in memory: all of them were read from ``reader``, and checked.

    Attributes:
        was_plain: whether they needed no decoding.
    """

    is_plain = True

    def __init__(self, reader: BlockReader) -> None:
        self.id, self.tier, self.spec = reader.id, reader.tier, reader.spec
        self.was_plain = reader.is_plain
        self._reader = reader
        self._pages = [reader.page(layer) if spec.token_bytes else None for layer, spec in enumerate(self.spec.layers)]

    def page(self, layer: int) -> Page:
        """Return the page of ``layer``."""
        page = self._pages[layer]
        if page is None:
            raise BlockError(f"block {self.id.key[:12]} has no bytes of layer {layer}")
        return page

    def landing(self, layer: int, first: int, last: int, view: PageView, *, check: bool = True) -> Landing:
        """Prepare to put the tokens ``[first, last)`` of the page of ``layer`` into ``view``."""
        return partial(view.take, self.page(layer), first, last)

    def states(self) -> torch.Tensor | None:
        """Return the states of a checkpoint."""
        return self._reader.states()

    def detach(self) -> None:
        """Hold no memory for the reader below; the pages stay."""
        self._reader.detach()

    def close(self) -> None:
        """Release the pages and the lease."""
        self._pages = []
        self._reader.close()


class BackFetch:
    """Reads the blocks of ``job`` into memory, the last ones first. The caller waits for as long as it likes.

    A block that cannot be read, or has not come, is left out of the load, and so is all that stands before it.

    Args:
        job: the load; it must not have been started.
        reading: threads that read.

    Attributes:
        changed: notified when a block has arrived, or failed.
    """

    def __init__(self, job: LoadJob, reading: Readers) -> None:
        self.job = job
        self._began = time.perf_counter()
        self._spans = job.spans_from_the_back()
        self._fetched: dict[str, FetchedBlock] = {}
        self._failed: dict[str, BlockError] = {}
        self.changed = threading.Condition()
        self._stopped = False
        self._late: tuple[str, TransferSample] | None = None
        self._note_late: Callable[[str, TransferSample], None] | None = None
        self._last_at = self._began
        self._stopped_after = 0.0
        first = job.reader(self._spans[0].block.key)
        self._first = first.tier, _nbytes(first)
        self._tasks: dict[str, Future[None]] = {
            key: reading.submit(partial(self._fetch, key))
            for key in dict.fromkeys(span.block.key for span in self._spans)
        }

    def _fetch(self, key: str) -> None:
        block, failed = None, None
        try:
            block = FetchedBlock(self.job.reader(key))
        except BlockError as error:
            failed = error
        with self.changed:
            if failed is not None:
                self._failed[key] = failed
            elif block is not None and not self._stopped:
                self._fetched[key] = block
                self._last_at = time.perf_counter()
            elif block is not None and not self._late:
                self._late = self._sample_with(block)
                self._tell_late()
            self.changed.notify_all()

    def _sample_with(self, block: FetchedBlock) -> tuple[str, TransferSample]:
        """Return how long it took until ``block`` came, and what came from its tier before."""
        blocks = [block, *(each for each in self._fetched.values() if each.tier == block.tier)]
        nbytes, decoded = sum(map(_nbytes, blocks)), sum(map(_decoded_nbytes, blocks))
        return block.tier, TransferSample(nbytes, self.elapsed_seconds, decoded)

    def when_late(self, note: Callable[[str, TransferSample], None]) -> None:
        """Tell ``note``, now or later on another thread, when the first block came that was being read at the end.

        Only where at most one had come before. It shows how slow a link is that was given up, and what of the time of
        one block was the wait for the link. After more blocks there is no need to ask: the computation may hold it up.
        """
        with self.changed:
            self._note_late = note
            self._tell_late()

    def _tell_late(self) -> None:
        note, late = self._note_late, self._late
        if note is not None and late is not None and len(self._fetched) <= 1:
            self._note_late = None
            note(*late)

    @property
    def arrived(self) -> int:
        """The first token from which on everything has arrived; the end of the load when nothing has."""
        with self.changed:
            return self._arrived()

    def _arrived(self) -> int:
        begin = self._spans[0].stop if self._spans else 0
        for span in self._spans:
            if span.block.key not in self._fetched:
                return max(begin, span.stop)
            begin = min(begin, span.start)
        return begin

    @property
    def settled(self) -> set[str]:
        """The keys of blocks that have arrived, or failed."""
        return {*self._fetched, *self._failed}

    @property
    def seconds(self) -> float:
        """From the beginning to the arrival of the last block so far."""
        return self._last_at - self._began

    @property
    def elapsed_seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._began

    def samples(self) -> Mapping[str, TransferSample]:
        """Return by tier how many bytes have arrived, and how long that took.

        Where it was stopped before anything came, the block that was needed first is taken to need as long again.
        """
        with self.changed:
            if not self._fetched and self._stopped:
                tier, nbytes_of_one = self._first
                return {tier: TransferSample(nbytes_of_one, 2 * self._stopped_after)}
            nbytes, decoded = Counter[str](), Counter[str]()
            for block in self._fetched.values():
                nbytes[block.tier] += _nbytes(block)
                decoded[block.tier] += _decoded_nbytes(block)
        total = sum(nbytes.values())
        return {tier: TransferSample(n, self.seconds * n / total, decoded[tier]) for tier, n in nbytes.items()}

    def wait(self, token: int, seconds: float) -> None:
        """Wait until everything from ``token`` on has arrived, or nothing more will; ``seconds`` at most."""
        until = time.perf_counter() + seconds
        with self.changed:
            while self._arrived() > token and not self._is_stuck():
                left = until - time.perf_counter()
                if left <= 0:
                    return
                self.changed.wait(left)

    @property
    def is_stuck(self) -> bool:
        """Whether the block that is needed next cannot be read."""
        with self.changed:
            return self._is_stuck()

    def _is_stuck(self) -> bool:
        keys = (span.block.key for span in self._spans)
        return next((key for key in keys if key not in self._fetched), None) in self._failed

    def stop(self, token: int) -> int:
        """Give up what has not arrived, and what stands before ``token``. Returns the first token that is left.

        From here on the job loads the rest from memory.
        """
        with self.changed:
            self._stopped, self._stopped_after = True, self.elapsed_seconds
            for task in self._tasks.values():
                task.cancel()
            begin = max(token, self._arrived())
            fetched, failed = dict(self._fetched), dict(self._failed)
        self.job.cut(begin, fetched, failed, self._tasks)
        return begin


def _nbytes(block: BlockReader) -> int:
    return len(block.id.tokens) * sum(spec.token_bytes for spec in block.spec.layers)


def _decoded_nbytes(block: FetchedBlock) -> int:
    return 0 if block.was_plain else _nbytes(block)
