"""Helpers for window blocks: layer 0 sees everything, layers 1 and 2 slide. K and V are those of ``stores.truth``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtier.kv.page import Page, PageView
from kvtier.store import PrefixStore
from kvtier.store.chain import TokenIds
from kvtier.store.commit import Windows
from kvtier.store.reading.lookup import PrefixMatch, Span
from tests.support.stores import DIM, HEADS, ROOT, column, same_bits

LAYERS = 3
SLIDING = (1, 2)
EVERYTHING = (0, 1, 2)


def pages(
    root: str, tokens: TokenIds, start: int, stop: int, *, window: bool, slides: Sequence[int] = SLIDING
) -> tuple[Page, ...]:
    """Return the pages of a window block, or of a block of the chain; empty ones for the layers of the other."""
    found = []
    for layer in range(LAYERS):
        if (layer in slides) == window:
            columns = [column(root, tokens, position, layer) for position in range(start, stop)]
            found.append(Page(torch.stack([k for k, _ in columns], 1), torch.stack([v for _, v in columns], 1)))
        else:
            found.append(Page(torch.empty(0, stop - start, 0), torch.empty(0, stop - start, 0)))
    return tuple(found)


def keep(
    store: PrefixStore,
    tokens: TokenIds,
    *spans: tuple[int, int],
    root: str = ROOT,
    states: dict[int, torch.Tensor] | None = None,
    slides: Sequence[int] = SLIDING,
) -> int:
    """Commit ``tokens``, with window blocks for those within ``spans``."""

    def read_window(start: int, stop: int) -> tuple[Page, ...]:
        assert any(first <= start and stop <= last for first, last in spans)
        return pages(root, tokens, start, stop, window=True, slides=slides)

    return store.commit(
        root,
        tokens,
        lambda start, stop: pages(root, tokens, start, stop, window=False, slides=slides),
        {"of": "a test"},
        states,
        windows=Windows(spans, read_window),
    )


def found(store: PrefixStore, tokens: TokenIds, root: str = ROOT, limit: int | None = None) -> list[tuple[int, int]]:
    """Return the tokens that window blocks of the match cover, as ranges; adjacent ones are united."""
    return united(store.windows(root, tokens, store.match(root, tokens, limit)))


def united(spans: Sequence[Span]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for span in spans:
        assert span.block.is_window
        assert span.first == 0
        assert span.tokens > 0
        if ranges and ranges[-1][1] == span.start:
            ranges[-1] = (ranges[-1][0], span.stop)
        else:
            assert not ranges or ranges[-1][1] < span.start
            ranges.append((span.start, span.stop))
    return ranges


def check_restored(
    store: PrefixStore, match: PrefixMatch, windows: Sequence[Span], tokens: TokenIds, root: str = ROOT, slides=SLIDING
) -> None:
    """Restore the match with ``windows``; compare every byte of every layer, also of the places between."""
    assert not any(span.block.is_window for span in match.spans)
    buffers = [tuple(torch.zeros(HEADS, match.length + 3, DIM) for _ in "kv") for _ in range(LAYERS)]
    job = store.restore([match.spans], windows=[windows])
    try:
        per_layer = {layer: windows if layer in slides else match.spans for layer in EVERYTHING}
        nbytes = 0
        for layer, spans in per_layer.items():
            assert job.spans(0, layer) == list(spans)
            assert (job.spec.layers[layer].token_bytes > 0) == bool(spans)
            nbytes += sum(span.tokens for span in spans) * 2 * HEADS * DIM * 4
        assert job.nbytes == nbytes
        job.start(lambda layer, row: (PageView.on(*buffers[layer]), 0))
        for layer, spans in per_layer.items():
            job.wait(layer)
            expected = [torch.zeros_like(part) for part in buffers[layer]]
            for span in spans:
                for position in range(span.start, span.stop):
                    for part, truth in zip(expected, column(root, tokens, position, layer), strict=True):
                        part[:, position] = truth
            assert all(map(same_bits, buffers[layer], expected))
        job.check()
    finally:
        job.close()
