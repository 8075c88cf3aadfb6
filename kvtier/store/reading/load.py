"""LoadJob: copies the pages of matched blocks to their places, layer by layer. Handles blocks that cannot be used."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING

from kvtier.costs.transfer import TransferSample
from kvtier.errors import BlockError, GoneError, RestoreError, UnavailableError
from kvtier.kv.page import PageView
from kvtier.kv.spec import KVSpec, LayerSpec
from kvtier.store.block import BlockReader, Landing
from kvtier.store.reading.lookup import Span
from kvtier.store.tiers.stack import TierStack
from kvtier.transfer.threads import Readers

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("kvtier.store")
_UNAVAILABLE = "unavailable"  # an entry of ``_warned``, beside keys of blocks
_Uses = Mapping[str, Sequence[tuple[int, Span]]]
"""Key of a block → the rows that use it, each with its span."""
Place = Callable[[int, int], tuple[PageView, int]]
"""``(layer, row)`` → the view that takes K and V of that layer and row, and the row's token at its index 0."""
_Views = Mapping[int, tuple[PageView, int]]  # by row, what ``Place`` returns


def summary(errors: Mapping[str, BlockError]) -> str:
    """Return the first of ``errors`` (key → error) as text, with the number of other errors."""
    first, *others = errors.values()
    return f"{first} (and {len(others)} more)" if others else str(first)


class UnusableBlocks:
    """Blocks of one store that could not be used: damaged ones are discarded, ones that cannot be read now withheld.

    Each damaged block is warned about once, and blocks that cannot be read once in all. Thread-safe.

    Args:
        tiers: the tiers of the store.
        tally: counts of the store.
        lock: held to change ``tally``.
    """

    def __init__(self, tiers: TierStack, tally: Counter[str], lock: threading.Lock) -> None:
        self._tiers = tiers
        self._tally = tally
        self._lock = lock
        self._warned: set[str] = set()

    def note(self, errors: Mapping[str, BlockError]) -> None:
        """Discard or withhold blocks; ``errors`` maps their keys to errors."""
        if not errors:
            return
        damaged = {key: error for key, error in errors.items() if not isinstance(error, UnavailableError)}
        gone = {key for key, error in errors.items() if isinstance(error, GoneError)}
        unavailable = {key: error for key, error in errors.items() if key not in damaged and key not in gone}
        self._tiers.withhold(unavailable)
        self._tiers.discard(damaged)
        with self._lock:
            for reason, keys in (("damaged", damaged), ("unavailable", unavailable), ("gone", gone)):
                if keys:
                    self._tally[f"misses.{reason}"] += len(keys)
            new = [*(key for key in damaged if key not in self._warned)]
            news = {key: damaged[key] for key in new}
            self._warned.update(news)
            is_first = bool(unavailable) and _UNAVAILABLE not in self._warned
            self._warned.update([_UNAVAILABLE] * is_first)
        if is_first:
            _log.warning(
                "stored blocks cannot be used now: %s; they stay, and their tokens are recomputed", summary(unavailable)
            )
        if len(news) == 1:
            _log.warning("a stored block cannot be used and was removed: %s; its tokens are recomputed", summary(news))
        elif news:
            text = "%d stored blocks cannot be used and were removed: %s; their tokens are recomputed"
            _log.warning(text, len(news), summary(news))


def odd_ones(readers: Mapping[str, BlockReader], windows: Container[str]) -> list[str]:
    """Return the keys of open blocks whose layers differ from those of most others of their kind.

    ``windows`` has the keys of window blocks. If these have another number of layers than the others, all are odd.
    """
    odd: list[str] = []
    usual: list[KVSpec] = []
    for is_window in (False, True):
        some = {key: reader.spec for key, reader in readers.items() if (key in windows) == is_window}
        if some:
            ((spec, _),) = Counter(some.values()).most_common(1)
            usual.append(spec)
            is_like = {
                each: each.is_like(spec) and len(spec.layers) == len(usual[0].layers) for each in {*some.values()}
            }
            odd += [key for key in some if not is_like[some[key]]]
    return odd


class LoadJob:
    """Loads the pages of ``rows`` and ``windows``, one task per layer, in layer order.

    A layer that the blocks of ``rows`` have no bytes of comes from the window blocks. Each page is read once, however
    many rows use it. Failed blocks are reported together through ``unusable``, by ``wait`` or at the latest by
    ``close``. Their bytes are never used as K and V, since ``states``, ``land``, ``check`` and ``wait`` raise
    ``RestoreError`` when something could not be read.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Span]],
        readers: Mapping[str, BlockReader],
        reading: Readers,
        unusable: Callable[[Mapping[str, BlockError]], None],
        checkpoints: Sequence[str] = (),
        windows: Sequence[Sequence[Span]] = (),
    ) -> None:
        of_chain, of_windows = _uses_of(rows), _uses_of(windows)
        specs = {key in of_windows: reader.spec for key, reader in readers.items()}  # equal for blocks of one kind
        kinds = [(specs[of], uses) for of, uses in ((False, of_chain), (True, of_windows)) if of in specs]
        self.spec, self._uses = _united(kinds)
        self._readers = readers
        self._reading = reading
        self._note_unusable = unusable
        self._checkpoints = tuple(checkpoints)
        self._layers: list[Future[bool]] = []
        self._failed: dict[str, BlockError] = {}
        self._reported: set[str] = set()
        self._lent: set[str] = set()
        self._closed = False
        self._place: Place | None = None
        self._timed: list[tuple[str, int, int, float, float]] = []  # tier, bytes, those decoded, begin, end
        self._pid = os.getpid()
        self._until: float | None = None
        self._gave_up = False

    @property
    def has_states(self) -> bool:
        """Whether there is a checkpoint for each row."""
        return bool(self._checkpoints)

    def states(self, row: int) -> torch.Tensor:
        """Return the states of the checkpoint of ``row``, U8 ``[bytes]``, read only."""
        key = self._checkpoints[row]
        try:
            states = self._readers[key].states()
            if states is None:
                raise BlockError(f"block {key[:12]} has no states")
        except BlockError as error:
            self._failed[key] = error
            raise self._lost() from error
        return states

    @property
    def nbytes(self) -> int:
        """Bytes of K and V of all rows."""
        return sum(
            spec.token_bytes * sum(span.tokens for uses in all_uses.values() for _, span in uses)
            for spec, all_uses in zip(self.spec.layers, self._uses, strict=True)
        )

    def tier(self, key: str) -> str:
        """Return the name of the tier that a block is read from, e.g. ``host`` or ``disk``."""
        return self._readers[key].tier

    def start(self, place: Place, patience_seconds: float | None = None) -> None:
        """Start to copy the pages of all layers.

        Args:
            place: returns the view for a layer and row.
            patience_seconds: after so long, what has not landed is given up; None for never. A view is then written to
                later, or never.
        """
        self._place = place
        self._until = None if patience_seconds is None else time.monotonic() + patience_seconds
        views = [self._views(layer, place) for layer in range(len(self.spec.layers))]  # here: nothing waits for threads
        self._layers = [self._reading.submit(partial(self._land, layer, rows)) for layer, rows in enumerate(views)]

    def land(self, layer: int, place: Place, begin: int = 0, end: int = sys.maxsize) -> None:
        """Copy the pages of ``layer`` now, in the calling thread.

        Args:
            layer: which layer.
            place: returns the view for a layer and row.
            begin: skip spans that start before this token of their sequence.
            end: skip spans that start at this token or later.
        """
        if not self._land(layer, self._views(layer, place), begin, end):
            raise self._lost()

    def _views(self, layer: int, place: Place) -> _Views:
        rows = {row for uses in self._uses[layer].values() for row, _ in uses}
        return {row: place(layer, row) for row in rows}

    def _land(self, layer: int, views: _Views, begin: int = 0, end: int = sys.maxsize) -> bool:
        """Copy the pages of ``layer``, except of failed blocks; return whether all were copied."""
        token_bytes = self.spec.layers[layer].token_bytes
        prepared: list[tuple[str, int, Landing]] = []  # key, bytes
        complete = True
        for key, all_uses in self._uses[layer].items():
            uses = [(_at(views[row], span), span) for row, span in all_uses if begin <= span.start < end]
            if not uses:
                continue
            try:
                landing = None if key in self._failed else _landing(self._readers[key], layer, uses)
            except BlockError as error:
                self._failed[key], landing = error, None
            if landing is None:
                complete = False
            else:
                prepared.append((key, token_bytes * sum(span.tokens for _, span in uses), landing))
        for key, nbytes, land in prepared:
            complete = self._landed(key, nbytes, land) and complete
        return complete

    def _landed(self, key: str, nbytes: int, land: Landing) -> bool:
        """Call ``land``, which brings ``nbytes`` of a block; return whether they came."""
        reader, began = self._readers[key], time.perf_counter()
        try:
            if key in self._failed:
                return False
            land()
        except BlockError as error:
            self._failed[key] = error
            return False
        self._timed.append((reader.tier, nbytes, 0 if reader.is_plain else nbytes, began, time.perf_counter()))
        return True

    def samples(self) -> Mapping[str, TransferSample]:
        """Return by tier how many bytes have landed and how long that took, several threads at once."""
        timed = list(self._timed)
        if not timed:
            return {}
        wall = max(end for *_, end in timed) - min(begin for *_, begin, _ in timed)
        busy = sum(end - begin for *_, begin, end in timed) or 1.0
        nbytes, decoded, seconds = Counter[str](), Counter[str](), dict[str, float]()
        for tier, n, decoded_n, begin, end in timed:
            nbytes[tier] += n
            decoded[tier] += decoded_n
            seconds[tier] = seconds.get(tier, 0.0) + end - begin
        return {tier: TransferSample(n, wall * seconds[tier] / busy, decoded[tier]) for tier, n in nbytes.items()}

    def check(self) -> None:
        """Read all pages once, to check that they can be read."""
        for key, reader in self._readers.items():
            try:
                for layer, spec in enumerate(reader.spec.layers):
                    if spec.token_bytes:
                        reader.page(layer)
            except BlockError as error:
                self._failed[key] = error
        if self._failed:
            raise self._lost()

    def spans(self, row: int, layer: int) -> list[Span]:
        """Return the spans that ``layer`` of ``row`` is read from, in order."""
        return [span for uses in self._uses[layer].values() for r, span in uses if r == row]

    def reader(self, key: str) -> BlockReader:
        """Return the open block ``key``."""
        return self._readers[key]

    def lend(self, key: str) -> BlockReader:
        """Return the open block ``key``. From now on the caller must close it."""
        self._lent.add(key)
        self._readers[key].detach()
        return self._readers[key]

    def spans_from_the_back(self) -> list[Span]:
        """Return the spans of all rows, those that end last first."""
        spans = {(row, span.start): span for uses in self._uses for all_uses in uses.values() for row, span in all_uses}
        return sorted(spans.values(), key=lambda span: span.stop, reverse=True)

    def cut(
        self,
        begin: int,
        readers: Mapping[str, BlockReader],
        failed: Mapping[str, BlockError],
        reading: Mapping[str, Future[None]],
    ) -> None:
        """Leave out what stands before token ``begin``; from then on read from ``readers``. Before ``start``.

        Args:
            begin: index of a token of each sequence.
            readers: by key, of all blocks that stay.
            failed: blocks that could not be read.
            reading: by key, tasks that may still use the readers so far: a block is closed when its task has ended.
        """
        self._uses = [
            {
                key: cut
                for key, all_uses in uses.items()
                if (cut := [(row, part) for row, span in all_uses if (part := span.from_token(begin)) is not None])
            }
            for uses in self._uses
        ]
        kept = {key for uses in self._uses for key in uses}
        for key, reader in self._readers.items():
            given_up = readers.get(key, reader)
            if key not in kept:
                _close_after(reading.get(key), given_up)
        self._readers = {key: readers[key] for key in kept}
        self._note_unusable(failed)

    def wait(self, layer: int) -> None:
        """Wait until the pages of ``layer`` have landed.

        Raises:
            RestoreError: a page could not be read. All other layers have then finished too, and every failed block was
                reported: one attempt finds all lost blocks. Or it has not come in time: all blocks are then withheld.
        """
        self._go_on_after_fork()
        try:
            if self._layers[layer].result(self._left_seconds()):
                return
            is_late = bool(wait(self._layers, self._left_seconds()).not_done)
        except TimeoutError:
            is_late = True
        if is_late:
            self._gave_up = True
            raise self.reject("its blocks take longer to load than to compute")
        raise self._lost()

    def _left_seconds(self) -> float | None:
        return None if self._until is None else max(0.0, self._until - time.monotonic())

    def _go_on_after_fork(self) -> None:
        """Read, in a forked child, the layers that the threads of its parent had not finished."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        for layer, landed in enumerate(self._layers):
            if not landed.done() and self._place is not None:
                self._layers[layer] = Future()
                self._layers[layer].set_result(self._land(layer, self._views(layer, self._place)))

    def _lost(self) -> RestoreError:
        """Report the failed blocks; return the error to raise."""
        failed = self._report()
        error = RestoreError(summary(failed))
        error.__cause__ = next(iter(failed.values()))
        return error

    def _report(self) -> Mapping[str, BlockError]:
        """Report each failed block once: a later block under its key may be good. Return all failed blocks."""
        failed = {key: self._failed[key] for key in self._readers if key in self._failed}
        news = {key: error for key, error in failed.items() if key not in self._reported}
        self._reported.update(news)
        self._note_unusable(news)
        return failed

    def give_head_start(self, seconds: float) -> None:
        """Wait until all pages have landed or failed, but not longer than ``seconds``."""
        self._go_on_after_fork()
        wait(self._layers, timeout=seconds)

    def reject(self, reason: str) -> RestoreError:
        """Withhold all blocks, which do not fit the layers as they are now. Returns the error to raise."""
        self._note_unusable(dict.fromkeys(self._readers, UnavailableError(reason)))
        return RestoreError(reason)

    def close(self) -> None:
        """Stop loading and close the files. No page is written afterwards. May be called more than once."""
        if self._closed:
            return
        self._closed = True
        if self._pid != os.getpid():  # a forked child has none of the threads
            self._layers = [layer for layer in self._layers if layer.done()]
        for layer in self._layers:
            layer.cancel()
        running = [layer for layer in self._layers if not layer.cancelled()]
        if self._gave_up and not all(layer.done() for layer in running):
            self._reading.leave_behind()
            threading.Thread(target=self._release, args=(running,), name="kvtier-late", daemon=True).start()
        else:
            self._release(running)
        self._report()

    def _release(self, running: Sequence[Future[bool]]) -> None:
        """Close the files that no running task uses any more."""
        for layer in running:
            layer.exception()
        for key, reader in self._readers.items():
            if key not in self._lent:
                reader.close()


def _close_after(task: Future[None] | None, reader: BlockReader) -> None:
    """Close ``reader`` when ``task`` no longer uses it."""
    if task is None:
        reader.close()
    else:
        task.add_done_callback(lambda _: reader.close())


def _uses_of(rows: Sequence[Sequence[Span]]) -> _Uses:
    found: dict[str, list[tuple[int, Span]]] = {}
    for row, spans in enumerate(rows):
        for span in spans:
            found.setdefault(span.block.key, []).append((row, span))
    return found


def _united(kinds: Sequence[tuple[KVSpec, _Uses]]) -> tuple[KVSpec, list[_Uses]]:
    """Return the layers of a load, and the uses that each is read from: the first of ``kinds`` that has bytes of it.

    A layer that no kind has bytes of is not read.
    """
    layers: list[LayerSpec] = []
    uses: list[_Uses] = []
    for specs in zip(*(spec.layers for spec, _ in kinds), strict=True):
        found = next((index for index, spec in enumerate(specs) if spec.token_bytes), None)
        layers.append(specs[found or 0])
        uses.append({} if found is None else kinds[found][1])
    return KVSpec(tuple(layers)), uses


def _landing(reader: BlockReader, layer: int, uses: Sequence[tuple[PageView, Span]]) -> Landing:
    """Prepare to put the page of ``layer`` into the places of ``uses``. It is read once."""
    if len(uses) == 1:
        ((view, span),) = uses
        return reader.landing(layer, span.first, span.last, view)

    def land() -> None:
        page = reader.page(layer)
        for view, span in uses:
            view.take(page, span.first, span.last)

    return land


def _at(place: tuple[PageView, int], span: Span) -> PageView:
    view, origin = place
    return view.cut(span.start - origin, span.stop - origin)
