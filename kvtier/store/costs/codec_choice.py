"""CodecChoice: raw files, or encoded ones where reading fewer bytes saves more time than decoding takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from kvtier.costs.book import CostBook
from kvtier.costs.encoding import EncodingCost, EncodingSample, pays
from kvtier.kv.codecs import BUILT_IN, Codec, ExponentZstd, Raw
from kvtier.store.block import Block

_BLOCKS_A_TRIAL = 64
_LAYERS_OF_A_TRIAL = 2
_BEST = EncodingCost(0.5, 4e9)  # no lossless codec keeps less of K and V, or decodes faster than memory is copied


class CodecChoice:
    """Chooses the codec of each block that is written, by what was measured with its model: ``compression="auto"``.

    Raw where nothing is known. Where a drive is so slow that encoding could pay, K and V of two layers of one block in
    64 are encoded and decoded, which tells what that saves and costs. It is asked behind the caller; a turn waits for
    none of it.

    Args:
        known: returns the costs of a root, without I/O; None where there are none.
        tier: the name of the tier whose loads count.
        now: monotonic seconds.
    """

    def __init__(
        self, known: Callable[[str], CostBook | None], tier: str, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._known = known
        self._tier = tier
        self._now = now
        self._plain, self._encoding = BUILT_IN[Raw.name], BUILT_IN[ExponentZstd.name]
        self._blocks: Counter[str] = Counter()  # by root, since it is known that encoding could pay
        self._found: dict[str, tuple[int, float | None]] = {}

    def __call__(self, block: Block) -> Codec:
        """Return the codec for ``block``, whose pages have arrived."""
        root = block.id.root
        book = self._known(root)
        byte_seconds = self._reading_byte_seconds(root, book) if book is not None else None
        if book is None or not pays(_BEST, byte_seconds):
            return self._plain
        if self._blocks[root] % _BLOCKS_A_TRIAL == 0:
            book.note_trial(self._encoding.name, self._trial(block))
        self._blocks[root] += 1
        return self._encoding if pays(book.encoding(self._encoding.name), byte_seconds) else self._plain

    def _reading_byte_seconds(self, root: str, book: CostBook) -> float | None:
        """Return how long reading a byte takes, fitted anew where something was measured since."""
        changes, found = self._found.get(root, (-1, None))
        if changes != book.changes:
            changes, found = book.changes, book.reading_byte_seconds(self._tier, self._encoding.name)
            self._found[root] = changes, found
        return found

    def _trial(self, block: Block) -> EncodingSample:
        """Encode and decode a few pages of ``block``."""
        layers = [page for page in block.pages if page.nbytes]
        some = layers[:: max(1, len(layers) // _LAYERS_OF_A_TRIAL)][:_LAYERS_OF_A_TRIAL]
        tensors = [tensor for page in some for tensor in (page.k_htd, page.v_htd)]
        payloads = [self._encoding.encode(tensor) for tensor in tensors]
        seconds = []
        for _ in range(2):  # the first one may load code, and find memory
            began = self._now()
            for payload, tensor in zip(payloads, tensors, strict=True):
                self._encoding.decode(payload, tuple(tensor.shape), tensor.dtype)
            seconds.append(self._now() - began)
        return EncodingSample(
            sum(tensor.nbytes for tensor in tensors), sum(payload.nbytes for payload in payloads), min(seconds)
        )
