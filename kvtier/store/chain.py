"""Sequences as chains of blocks: keys, the identity of a block, and common runs of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int64]


def block_key(parent: str, tokens: TokenIds, *, checkpoint: bool = False) -> str:
    """Return SHA-256 of the parent's key and the ids (little-endian int64), as hex.

    A ``checkpoint`` has another key than the block without states for the same ids: one more word, -1, which is no id,
    is hashed at the end.
    """
    digest = hashlib.sha256(bytes.fromhex(parent))
    digest.update(np.ascontiguousarray(tokens, dtype="<i8").tobytes())
    if checkpoint:
        digest.update(np.array([-1], dtype="<i8").tobytes())
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
    def of(cls, root: str, parent: str, tokens: TokenIds, *, checkpoint: bool = False) -> BlockId:
        """Return the identity of the block of ``tokens`` after ``parent``."""
        return cls(block_key(parent, tokens, checkpoint=checkpoint), parent, root, tokens)

    @property
    def is_checkpoint(self) -> bool:
        """Whether the block holds states, besides K and V. No block follows a checkpoint."""
        return self.key == block_key(self.parent, self.tokens, checkpoint=True)


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
