"""Lookup: the longest stored prefix of a sequence, to the token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from kvtier.report import Divergence
from kvtier.store.chain import BlockId, TokenIds, chain_keys, common_run, each_of_chain
from kvtier.store.tiers.stack import TierStack


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Tokens ``[first, last)`` of a block, which stand for tokens ``[start, stop)`` of a sequence."""

    block: BlockId
    start: int
    first: int
    last: int

    @property
    def tokens(self) -> int:
        """How many tokens the span has."""
        return self.last - self.first

    @property
    def stop(self) -> int:
        """Index of the first token of the sequence after the span."""
        return self.start + self.tokens

    def from_token(self, begin: int) -> Span | None:
        """Return the part from token ``begin`` of the sequence on; None when there is none."""
        skipped = max(0, begin - self.start)
        if skipped >= self.tokens:
            return None
        return Span(self.block, self.start + skipped, self.first + skipped, self.last)


@dataclass(frozen=True, slots=True, eq=False)
class PrefixMatch:
    """The longest stored prefix of a sequence, as spans in order and without gaps."""

    spans: tuple[Span, ...]
    divergence: Divergence | None

    @property
    def length(self) -> int:
        """Tokens matched."""
        return self.spans[-1].stop if self.spans else 0

    def between(self, begin: int, end: int) -> tuple[Span, ...]:
        """Return the spans of the tokens ``[begin, end)``, cut at both ends."""
        cut = []
        for span in self.spans:
            start, stop = max(span.start, begin), min(span.stop, end)
            if start < stop:
                cut.append(Span(span.block, start, span.first + start - span.start, span.last + stop - span.stop))
        return tuple(cut)


def longest_match(
    tiers: TierStack, root: str, tokens: TokenIds, limit: int, block_size: int, *, below: bool = True
) -> PrefixMatch:
    """Return the longest prefix of ``tokens`` that the tiers hold, of at most ``limit`` tokens.

    Without ``below``, custom tiers below the store's own are not asked.

    Full blocks are found by their keys, many in one query. After the last of them, the block with the longest common
    prefix counts up to the first difference. Ids are always compared: a key alone is no hit.
    """
    whole = each_of_chain(root, tokens[: len(tokens) // block_size * block_size], block_size)
    run = tiers.present_run(islice(whole, max(0, -(-limit // block_size))), below=below)
    starts = range(0, limit, block_size)
    spans = [Span(block, start, 0, min(block_size, limit - start)) for start, block in zip(starts, run, strict=False)]
    position, parent = (spans[-1].stop, run[-1].key) if run else (0, root)
    expected = tokens[position : position + block_size]
    block = nearest_block(tiers, root, parent, expected) if position < limit else None
    if block is None:
        return PrefixMatch(tuple(spans), None)
    common = common_run(block.tokens, expected)
    if common:
        spans.append(Span(block, position, 0, min(common, limit - position)))
    parts = common < len(block.tokens) and common < len(expected)
    divergence = Divergence.at(position + common, tokens, block.tokens, common) if parts else None
    return PrefixMatch(tuple(spans), divergence)


def checkpoints_of(
    tiers: TierStack, root: str, tokens: TokenIds, limit: int, block_size: int
) -> Iterator[tuple[int, BlockId]]:
    """Yield the stored checkpoints of prefixes of ``tokens`` of at most ``limit`` tokens, the longest first.

    Each comes with the number of tokens after which its states are valid. Blocks before it need not be stored.
    """
    whole = chain_keys(root, tokens[: limit // block_size * block_size], block_size)
    parents = [root, *(block.key for block in whole)]
    for index in reversed(range(len(parents))):
        parent, start = parents[index], index * block_size
        after = tokens[start : min(start + block_size, limit + 1)]  # tails are shorter
        found = {
            len(block.tokens): block
            for block in tiers.tails(parent, after)
            if block.root == root and block.is_checkpoint
        }
        for length in sorted(found, reverse=True):
            yield start + length, found[length]
        if index:  # a checkpoint as long as a block
            last = whole[index - 1]
            if last.checkpoint.key in tiers:
                yield start, last.checkpoint


def windows_of(tiers: TierStack, root: str, tokens: TokenIds, match: PrefixMatch, block_size: int) -> tuple[Span, ...]:
    """Return the stored window blocks of the tokens that ``match`` found, as spans in order, cut to its length.

    There may be holes between them. Window blocks beside full blocks are found by their keys, in one query. After the
    last full block that is matched whole, the window block with the longest common prefix counts up to the first
    difference.
    """
    full = [span for span in match.spans if span.tokens == block_size]
    windows = [span.block.window for span in full]
    present = tiers.present([window.key for window in windows])
    spans = [
        Span(window, span.start, 0, span.tokens)
        for span, window in zip(full, windows, strict=True)
        if window.key in present
    ]
    if len(full) < len(match.spans):
        last = match.spans[-1]
        expected = tokens[last.start : last.stop]
        window = nearest_block(tiers, root, last.block.parent, expected, windows=True)
        common = common_run(window.tokens, expected) if window is not None else 0
        if window is not None and common:
            spans.append(Span(window, last.start, 0, common))
    return tuple(spans)


def nearest_block(
    tiers: TierStack, root: str, parent: str, expected: TokenIds, *, windows: bool = False
) -> BlockId | None:
    """Return the block after ``parent`` with the longest common prefix with ``expected``.

    Only window blocks count with ``windows``, and all others without.
    """
    best, best_run = None, -1
    for child in tiers.nearest(parent, expected, windows=windows):
        run = common_run(child.tokens, expected)
        if child.root == root and run > best_run:
            best, best_run = child, run
    return best
