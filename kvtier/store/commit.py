"""BlockWriter: puts new blocks into RAM, and writes them to disk behind the caller."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from kvtier.errors import UnavailableError
from kvtier.kv.page import Page
from kvtier.store.block import Block, arrived
from kvtier.store.chain import BlockId, TokenIds, chain_keys, common_run
from kvtier.store.tiers.base import OrderedTier
from kvtier.store.tiers.disk.names import Names
from kvtier.store.tiers.stack import TierStack
from kvtier.store.write_behind import WriteBehind

Read = Callable[[int, int], tuple[Page, ...]]
"""``(start, stop)`` → host copies of the pages of all layers for those tokens; the store owns them."""


States = Mapping[int, torch.Tensor]
"""Number of tokens of a sequence → states valid after them, U8 ``[bytes]``; the store owns them."""


class BlockWriter:
    """Puts blocks into the tiers of one store.

    Args:
        tiers: the tiers of the store.
        behind: runs tasks behind the caller.
        on_second_use: write a block to the durable tier when a second turn uses it, not when the first one does.
    """

    def __init__(self, tiers: TierStack, behind: WriteBehind, *, on_second_use: bool = False) -> None:
        self._tiers = tiers
        self._host = tiers.host
        self._behind = behind
        self._on_second_use = on_second_use
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
        arrive: Callable[[], None] = arrived,
        imported: bool = False,
    ) -> int:
        """Store the K and V of ``tokens`` as ``PrefixStore.commit`` does; return how many are new, without checkpoints.

        ``arrive`` blocks until the pages that ``read`` returned hold their bytes. ``imported`` tokens come from an
        archive. Their ``manifest`` is untrusted, and used only where the root has none yet. All imported blocks are
        written to disk, even without a second use.
        """
        self._committing.arrive = arrive
        try:
            return self._commit(root, tokens, read, manifest, block_size, states, arrive, imported=imported)
        finally:
            del self._committing.arrive

    def _commit(
        self,
        root: str,
        tokens: TokenIds,
        read: Read,
        manifest: Mapping[str, Any] | None,
        block_size: int,
        states: States | None,
        arrive: Callable[[], None],
        *,
        imported: bool,
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
            if states is not None:
                keys += self._keep_snapshots(block, start, read, states, arrive)
                if len(block.tokens) < block_size:
                    break  # no turn could continue from it
            there = self.stands_for(block, block_size)
            if there is not None:
                known.append(there)
            else:
                self._write_what_disk_lacks(known, keep_tails=keep_tails)  # first: these are its ancestors
                known = []
                whole = Block(block, read(start, stop), start, arrive=arrive)
                is_tail = len(block.tokens) < block_size
                if not self._keep(whole, keep_tails=keep_tails, is_tail=is_tail, imported=imported):
                    break  # its children could never be found
                new += len(block.tokens)
            keys.append(block.key)
        self._write_what_disk_lacks(known, keep_tails=keep_tails)
        self._touch(keys)
        return new

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
        in_ram = [key for key in keys if self._host.block(key) is not None and not self._behind.waits(key)]
        if not in_ram:
            return

        def write() -> None:
            for key in self._tiers.absent_below(in_ram):
                block = self._host.block(key)
                if block is None or not self._put_below(block, keep_tails):
                    break  # later blocks would be orphans

        self._behind.submit(write)

    def _keep_snapshots(
        self, block: BlockId, start: int, read: Read, states: States, arrive: Callable[[], None]
    ) -> list[str]:
        """Store the checkpoints of prefixes that end in ``block``, whose first token is ``start``; return their keys.

        Besides the states, each holds its own K and V: a longer block does not stand in for a checkpoint.
        """
        keys = []
        for position in sorted(p for p in states if start < p <= start + len(block.tokens)):
            ids = block.tokens[: position - start].copy()
            checkpoint = BlockId.of(block.root, block.parent, ids, checkpoint=True)
            kept = checkpoint.key in self._tiers or self._keep(
                Block(checkpoint, read(start, position), start, states[position], arrive), keep_tails=True
            )
            if kept:
                keys.append(checkpoint.key)
        return keys

    def manifest(self, root: str) -> Mapping[str, Any]:
        """Return the description of ``root``; empty when it is not known."""
        if root in self._manifests:
            return self._manifests[root]
        return self._tiers.description(root)

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
                checkpoint = BlockId.of(block.root, block.parent, block.tokens, checkpoint=True)
                key = checkpoint.key if checkpoint.key in self._tiers else key
            if key is None:
                break
            keys.append(key)
        return keys

    def stands_for(self, block: BlockId, block_size: int) -> str | None:
        """Return the key of a stored block that covers ``block``: itself, or a longer one with the same first tokens.

        None when no tier has either.
        """
        if block.key in self._tiers:
            return block.key
        if len(block.tokens) < block_size:
            for child in self._tiers.nearest(block.parent, block.tokens):
                if child.root == block.root and common_run(child.tokens, block.tokens) == len(block.tokens):
                    return child.key
        return None

    def _keep(self, block: Block, *, keep_tails: bool, is_tail: bool = False, imported: bool = False) -> bool:
        """Put ``block`` into RAM and queue its write. Returns whether a tier keeps it."""
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
                    return self._put_below(block, keep_tails)  # no room in RAM: write it now
                self._behind.note_stall()  # RAM stays full of unwritten blocks
                return False
            since = None if keep_tails else self._drop_shorter(self._host, block.id)
            queued = (
                self._behind.submit_at_rest(key, write, since)
                if is_tail and not keep_tails
                else self._behind.submit(write)
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

    def _put_below(self, block: Block, keep_tails: bool) -> bool:
        kept = self._tiers.put_below(block)
        if kept and not keep_tails:
            self._drop_shorter(self._tiers.last, block.id)
        return kept

    def _drop_shorter(self, tier: OrderedTier, block: BlockId) -> float | None:
        """Forget tails that are a prefix of ``block``, which covers them now that the tier has it.

        Returns:
            When the first of them began to wait to be written; None if none waited.
        """
        waited = []
        for tail in tier.tails(block.parent, block.tokens):
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
