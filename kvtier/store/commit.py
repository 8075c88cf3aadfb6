"""BlockWriter: puts new blocks into RAM, and writes them to disk behind the caller."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from kvtier.errors import UnavailableError
from kvtier.kv.page import Page
from kvtier.store.block import Block, arrived
from kvtier.store.chain import BlockId, BlockKind, TokenIds, chain_keys, common_run
from kvtier.store.tiers.base import OrderedTier
from kvtier.store.tiers.disk.names import Names
from kvtier.store.tiers.stack import TierStack
from kvtier.store.write_behind import WriteBehind

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("kvtier.store")
Read = Callable[[int, int], tuple[Page, ...]]
"""``(start, stop)`` → host copies of the pages of all layers for those tokens; the store owns them."""


States: TypeAlias = "Mapping[int, torch.Tensor]"
"""Number of tokens of a sequence → states valid after them, U8 ``[bytes]``; the store owns them."""


@dataclass(frozen=True, slots=True)
class Windows:
    """K and V of the layers with sliding attention, which buffers hold for some tokens of a sequence only.

    Attributes:
        spans: those tokens, as ranges ``[start, stop)``.
        read: returns the pages of all layers for tokens within one of the spans; empty ones for layers that do not
            slide.
    """

    spans: tuple[tuple[int, int], ...]
    read: Read

    def cover(self, start: int, stop: int) -> bool:
        """Whether one of the spans has all tokens ``[start, stop)``."""
        return any(first <= start and stop <= last for first, last in self.spans)


class BlockWriter:
    """Puts blocks into the tiers of one store.

    Args:
        tiers: the tiers of the store.
        behind: runs tasks behind the caller.
        on_second_use: write a block to the durable tier when a second turn uses it, not when the first one does.
        is_loaded_too_slowly: whether no turn gains by loading the first so many tokens of a root from the durable tier.

    Attributes:
        not_worth_writing: how many new blocks stayed in RAM, because no turn gains by loading them.
    """

    def __init__(
        self,
        tiers: TierStack,
        behind: WriteBehind,
        *,
        on_second_use: bool = False,
        is_loaded_too_slowly: Callable[[str, int], bool] = lambda root, tokens: False,
    ) -> None:
        self._tiers = tiers
        self._host = tiers.host
        self._behind = behind
        self._on_second_use = on_second_use
        self._is_loaded_too_slowly = is_loaded_too_slowly
        self.not_worth_writing = 0
        self._has_told = False
        self._manifests: dict[str, Mapping[str, Any]] = {}
        self._hits: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._committing = threading.local()

    def commit(
        self,
        root: str,
        tokens: TokenIds,
        read: Read,
        manifest: Mapping[str, Any] | None,
        block_size: int,
        states: States | None = None,
        *,
        windows: Windows | None = None,
        arrive: Callable[[], None] = arrived,
        imported: bool = False,
        weighs: bool = False,
    ) -> int:
        """Store the K and V of ``tokens`` as ``PrefixStore.commit`` does; return how many are new.

        Checkpoints and window blocks do not count.

        ``arrive`` blocks until the pages that ``read`` returned hold their bytes. ``imported`` tokens come from an
        archive. Their ``manifest`` is untrusted, and used only where the root has none yet. All imported blocks are
        written to disk, even without a second use.

        With ``weighs``, all new blocks of a sequence stay in RAM if no turn gains by loading it from the durable tier:
        a block is never written without those before it. They are written with a later commit of a longer sequence
        that is worth it, or when the sequence is named, as far as RAM still has them.
        """
        self._committing.arrive = arrive
        stays = weighs and self._stays_in_ram(root, len(tokens))
        try:
            return self._commit(
                root, tokens, read, manifest, block_size, states, windows, arrive, imported=imported, stays=stays
            )
        finally:
            del self._committing.arrive

    def _stays_in_ram(self, root: str, tokens: int) -> bool:
        """Whether the first ``tokens`` of a sequence are not worth writing; tiers below the disk may be faster."""
        if self._on_second_use or not self._tiers.is_durable or self._tiers.has_lower:
            return False
        if not self._is_loaded_too_slowly(root, tokens):
            return False
        if not self._has_told:
            self._has_told = True
            _log.info("computing %d tokens is measured to be much faster than loading them: they stay in RAM", tokens)
        return True

    def _commit(
        self,
        root: str,
        tokens: TokenIds,
        read: Read,
        manifest: Mapping[str, Any] | None,
        block_size: int,
        states: States | None,
        windows: Windows | None,
        arrive: Callable[[], None],
        *,
        imported: bool,
        stays: bool,
    ) -> int:
        if manifest is not None and root not in self._manifests:
            writes_behind = self._tiers.writes_behind
            is_noted = not writes_behind or self._behind.submit(
                partial(self._tiers.describe_root, root, manifest, anew=not imported)
            )
            if is_noted and not (self._tiers.is_durable and imported):
                self._manifests[root] = manifest
        keep_tails = states is not None
        new = 0
        keys: list[str] = []
        known: list[str] = []
        for start, block in zip(range(0, len(tokens), block_size), chain_keys(root, tokens, block_size), strict=True):
            stop = start + len(block.tokens)
            is_tail = len(block.tokens) < block_size
            ends: list[BlockId] = []  # blocks whose window blocks are kept
            if states is not None:
                ends += self._keep_snapshots(block, start, read, states, arrive, stays=stays)
                keys += [checkpoint.key for checkpoint in ends]
            is_kept = True
            if states is None or not is_tail:  # otherwise no turn could continue from it
                there = self.stands_for(block, block_size)
                if there is not None:
                    known.append(there)
                else:
                    if not stays:
                        self._write_what_disk_lacks(known, keep_tails=keep_tails)  # first: these are its ancestors
                    known = []
                    whole = Block(block, read(start, stop), start, arrive=arrive)
                    is_kept = self._keep(whole, keep_tails=keep_tails, is_tail=is_tail, imported=imported, stays=stays)
                    new += len(block.tokens) * is_kept
                if is_kept:
                    keys.append(block.key)
                    ends.append(block)
            for end in reversed(ends):  # the longest first: it covers the others
                if windows is None or not windows.cover(start, start + len(end.tokens)):
                    continue
                there = self.stands_for(end.window, block_size, windows=True)
                if there is None:
                    if not stays:
                        self._write_what_disk_lacks(known, keep_tails=keep_tails)
                    known = []
                    there = self._keep_window(
                        end.window, start, windows, block_size, arrive, imported=imported, stays=stays
                    )
                else:
                    known.append(there)
                if there is not None:
                    keys.append(there)
            if not is_kept:
                break  # its children could never be found
        if not stays:
            self._write_what_disk_lacks(known, keep_tails=keep_tails)
        self._touch(list(dict.fromkeys(keys)))
        return new

    def _keep_window(
        self,
        window: BlockId,
        start: int,
        windows: Windows,
        block_size: int,
        arrive: Callable[[], None],
        *,
        imported: bool,
        stays: bool,
    ) -> str | None:
        """Store a window block, whose first token is ``start``; return its key, or None if no tier keeps it."""
        block = Block(window, windows.read(start, start + len(window.tokens)), start, arrive=arrive)
        is_tail = len(window.tokens) < block_size
        is_kept = self._keep(block, keep_tails=False, is_tail=is_tail, imported=imported, stays=stays)
        return window.key if is_kept else None

    def hurry(self) -> None:
        """Run waiting writes soon: this thread is about to wait for room. First, pages that they wait for arrive."""
        self._behind.hurry()
        with contextlib.suppress(UnavailableError):  # the writes fail for it
            getattr(self._committing, "arrive", arrived)()

    def write_down(self, keys: Sequence[str]) -> None:
        """Write the blocks that disk lacks of a chain to be named, behind the caller: it must outlive this process."""
        self._behind.hurry()
        self._write_what_disk_lacks(keys, keep_tails=True)

    def _write_what_disk_lacks(self, keys: Sequence[str], *, keep_tails: bool) -> None:
        """Write blocks of a chain again that are in RAM alone: the drive was full, or it evicted them.

        Without them, no later block of the chain could be kept on disk. The writes run behind the caller.
        """
        if not self._tiers.writes_behind:
            return
        # The other blocks are on disk, or will be.
        found = [block for key in keys if (block := self._host.block(key)) is not None and not self._behind.waits(key)]
        if not found:
            return
        in_ram = [block.id.key for block in found]

        def write() -> None:
            for key in self._tiers.absent_below(in_ram):
                block = self._host.block(key)
                is_kept = block is not None and self._put_below(block, keep_tails)
                if not is_kept and (block is None or not block.id.is_window):
                    break  # later blocks would be orphans

        self._behind.submit(write, sum(block.nbytes for block in found))

    def _keep_snapshots(
        self, block: BlockId, start: int, read: Read, states: States, arrive: Callable[[], None], *, stays: bool
    ) -> list[BlockId]:
        """Store the checkpoints of prefixes that end in ``block``, whose first token is ``start``; return kept ones.

        Besides the states, each holds its own K and V: a longer block does not stand in for a checkpoint.
        """
        checkpoints = []
        for position in sorted(p for p in states if start < p <= start + len(block.tokens)):
            ids = block.tokens[: position - start].copy()
            checkpoint = BlockId.of(block.root, block.parent, ids, BlockKind.CHECKPOINT)
            kept = checkpoint.key in self._tiers or self._keep(
                Block(checkpoint, read(start, position), start, states[position], arrive), keep_tails=True, stays=stays
            )
            if kept:
                checkpoints.append(checkpoint)
        return checkpoints

    def manifest(self, root: str) -> Mapping[str, Any]:
        """Return the description of ``root``; empty when it is not known."""
        if root in self._manifests:
            return self._manifests[root]
        return self._tiers.description(root)

    def forget_manifests(self) -> None:
        """Describe every root anew with its next commit."""
        self._manifests.clear()

    def hit(self, keys: Sequence[str]) -> None:
        """Count restored blocks; the next commit passes the counts to the tiers."""
        with self._counting:
            self._hits.update(keys)

    def _touch(self, keys: Sequence[str]) -> None:
        """Note that the blocks of a chain were used now; on disk behind the caller, which waits for no lock."""
        with self._counting:
            hits, self._hits = self._hits, Counter()
        self._host.touch(keys, hits)
        if not self._tiers.writes_behind:
            self._tiers.names.touched(keys)
        elif keys:
            self._behind.submit(partial(self._touch_below, keys, hits))

    def _touch_below(self, keys: Sequence[str], hits: Mapping[str, int]) -> None:
        self._tiers.touch_below(keys, hits)
        self._tiers.tell_names(lambda names: names.touched(keys))

    def chain_of(self, blocks: Sequence[BlockId], block_size: int) -> list[str]:
        """Return the key of a stored block that covers each of ``blocks``, a chain, up to the first that has none.

        That of the last is the key of a checkpoint, if one is stored.
        """
        keys: list[str] = []
        for block in blocks:
            key = self.stands_for(block, block_size)
            if block is blocks[-1]:
                key = block.checkpoint.key if block.checkpoint.key in self._tiers else key
            if key is None:
                break
            keys.append(key)
        return keys

    def windows_of(self, blocks: Sequence[BlockId], block_size: int) -> list[str]:
        """Return the keys of stored window blocks that cover the last of ``blocks``, a chain, without a hole between.

        The list ends with the key that covers the last block; it is empty when none does.
        """
        keys: list[str] = []
        for block in reversed(blocks):
            key = self.stands_for(block.window, block_size, windows=True)
            if key is None:
                break
            keys.append(key)
        return keys[::-1]

    def stands_for(self, block: BlockId, block_size: int, *, windows: bool = False) -> str | None:
        """Return the key of a stored block that covers ``block``: itself, or a longer one with the same first tokens.

        None when no tier has either. A window block covers window blocks alone, which are asked for with ``windows``,
        and another block covers none.
        """
        if block.key in self._tiers:
            return block.key
        if len(block.tokens) < block_size:
            for child in self._tiers.nearest(block.parent, block.tokens, windows=windows):
                if child.root == block.root and common_run(child.tokens, block.tokens) == len(block.tokens):
                    return child.key
        return None

    def _keep(
        self, block: Block, *, keep_tails: bool, is_tail: bool = False, imported: bool = False, stays: bool = False
    ) -> bool:
        """Put ``block`` into RAM and queue its write, unless it ``stays`` there. Returns whether a tier keeps it."""
        if stays:
            kept = self._put_into_ram(block, keep_tails)
            with self._counting:
                self.not_worth_writing += kept
            return kept
        if not self._tiers.writes_behind or (self._on_second_use and not imported):
            return self._put_into_ram(block, keep_tails)
        key = block.id.key

        def write() -> None:
            try:
                self._put_below(block, keep_tails)
            finally:
                self._host.written(key)

        try:
            if not self._host.put(block, writing=True):
                if not self._host.is_writing:
                    return self._put_below(block, keep_tails, in_turn=True)  # no room in RAM: write it now
                self._behind.note_stall()  # RAM stays full of unwritten blocks
                return False
            since = None if keep_tails else self._drop_shorter(self._host, block.id)
            queued = (
                self._behind.submit_at_rest(key, write, since, block.nbytes)
                if is_tail and not keep_tails
                else self._behind.submit(write, block.nbytes)
            )
            if not queued:
                self._host.written(key)  # it stays in RAM, and is written when a turn uses it again
        except BaseException:
            # After an interrupt it is unknown whether the block was put and queued. A leased block might never be
            # evicted, a stored one never be written.
            self._host.discard(key)
            raise
        return True

    def _put_into_ram(self, block: Block, keep_tails: bool) -> bool:
        kept = bool(self._host.put(block))
        if kept and not keep_tails:
            self._drop_shorter(self._host, block.id)
        return kept

    def _put_below(self, block: Block, keep_tails: bool, *, in_turn: bool = False) -> bool:
        kept = self._tiers.put_below(block, in_turn=in_turn)
        if kept and not keep_tails:
            self._drop_shorter(self._tiers.last, block.id)
        return kept

    def _drop_shorter(self, tier: OrderedTier, block: BlockId) -> float | None:
        """Forget tails of the same kind that are a prefix of ``block``, which covers them now that the tier has it.

        Returns:
            When the first of them began to wait to be written; None if none waited.
        """
        waited = []
        kind = BlockKind.WINDOW if block.is_window else BlockKind.PAGES
        for tail in tier.tails(block.parent, block.tokens):
            if not tail.is_a(kind):
                continue
            if tier is self._tiers.last:  # chains that end in the tail now end in this block
                self._tiers.tell_names(partial(_replace, tail.key, block.key))
            # No named chain ends in a waiting tail: ``write_down`` writes waiting tails.
            tier.discard_unread([tail.key])  # first: an unwritten tail must not stay in RAM for ever
            since = self._behind.take_back(tail.key)
            if since is not None:
                waited.append(since)
        return min(waited, default=None)


def _replace(old: str, new: str, names: Names) -> None:
    names.replaced(old, new)
