"""Sequences as chains of blocks: keys, the identity of a block, and common runs of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int64]


class BlockKind(Enum):
    """Kinds of blocks for the same ids. The value is the word that the key hashes after the ids; None for no word."""

    PAGES = None
    """A block of a chain: other blocks may follow it."""
    CHECKPOINT = -1
    """It holds states, besides K and V. No block follows it."""
    WINDOW = -2
    """It holds K and V of the layers with sliding attention alone. No block follows it."""


def block_key(parent: str, tokens: TokenIds, kind: BlockKind = BlockKind.PAGES) -> str:
    """Return SHA-256 of the parent's key and the ids (little-endian int64), as hex.

    Blocks of different kinds for the same ids have different keys: one more word, which is no id, is hashed at the end.
    """
    digest = hashlib.sha256(bytes.fromhex(parent))
    digest.update(np.ascontiguousarray(tokens, dtype="<i8").tobytes())
    if kind.value is not None:
        digest.update(np.array([kind.value], dtype="<i8").tobytes())
    return digest.hexdigest()


def common_run(a: TokenIds, b: TokenIds) -> int:
    """Return how many leading ids ``a`` and ``b`` share."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


@dataclass(frozen=True, slots=True, eq=False)
class BlockId:
    """Identity of a block: its token ids, after all tokens up to its parent."""

    key: str
    parent: str
    root: str
    tokens: TokenIds

    @classmethod
    def of(cls, root: str, parent: str, tokens: TokenIds, kind: BlockKind = BlockKind.PAGES) -> BlockId:
        """Return the identity of the block of ``tokens`` after ``parent``."""
        return cls(block_key(parent, tokens, kind), parent, root, tokens)

    def is_a(self, kind: BlockKind) -> bool:
        """Whether the block is of ``kind``, by its key."""
        return self.key == block_key(self.parent, self.tokens, kind)

    @property
    def is_checkpoint(self) -> bool:
        """Whether the block holds states, besides K and V. No block follows a checkpoint."""
        return self.is_a(BlockKind.CHECKPOINT)

    @property
    def is_window(self) -> bool:
        """Whether the block holds K and V of layers with sliding attention alone. No block follows a window block."""
        return self.is_a(BlockKind.WINDOW)

    def stays(self, is_stored: Callable[[str], bool]) -> str:
        """Return the key of the block that may not be evicted to make room for this one.

        That is its parent; for a window block, the block or checkpoint beside it, if it is stored.
        """
        if self.is_window:
            beside = (self.of(self.root, self.parent, self.tokens).key, self.checkpoint.key)
            return next(filter(is_stored, beside), self.parent)
        return self.parent

    @property
    def checkpoint(self) -> BlockId:
        """The identity of the checkpoint beside it: same parent, same ids."""
        return self.of(self.root, self.parent, self.tokens, BlockKind.CHECKPOINT)

    @property
    def window(self) -> BlockId:
        """The identity of the window block beside it: same parent, same ids."""
        return self.of(self.root, self.parent, self.tokens, BlockKind.WINDOW)


def chain_keys(root: str, tokens: TokenIds, block_size: int) -> list[BlockId]:
    """Return the chain of blocks of ``tokens`` after ``root``, each with its own copy of its ids."""
    return list(each_of_chain(root, tokens, block_size))


def each_of_chain(root: str, tokens: TokenIds, block_size: int) -> Iterator[BlockId]:
    """Yield the same blocks one by one: each takes a hash."""
    parent = root
    for start in range(0, len(tokens), block_size):
        block = BlockId.of(root, parent, tokens[start : start + block_size].copy())
        yield block
        parent = block.key
