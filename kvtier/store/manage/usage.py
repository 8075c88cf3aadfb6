"""Usage: the bytes of a store by root, each block counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from kvtier.store.block import Entry
from kvtier.store.names import Name


@dataclass(frozen=True, slots=True)
class RootUsage:
    """The bytes of one root: a model, with everything else that decides K and V.

    Attributes:
        root: the root.
        blocks: its blocks.
        nbytes: their bytes.
        named_bytes: of those, bytes of blocks that at least one name uses.
    """

    root: str
    blocks: int
    nbytes: int
    named_bytes: int


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """The bytes of all blocks.

    Attributes:
        roots: usage by root, the largest first.
    """

    roots: tuple[RootUsage, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(root.nbytes for root in self.roots)

    @property
    def unnamed_bytes(self) -> int:
        """Bytes of blocks that no name uses."""
        return self.nbytes - sum(root.named_bytes for root in self.roots)


def measure(entries: Iterable[Entry], names: Iterable[Name]) -> StoreUsage:
    """Add up ``entries``, all blocks of a store; ``names`` are all its names."""
    named = {key for name in names for key in name.keys}
    blocks: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    named_bytes: Counter[str] = Counter()
    for entry in entries:
        blocks[entry.root] += 1
        nbytes[entry.root] += entry.nbytes
        if entry.key in named:
            named_bytes[entry.root] += entry.nbytes
    roots = (RootUsage(root, blocks[root], nbytes[root], named_bytes[root]) for root in blocks)
    return StoreUsage(tuple(sorted(roots, key=lambda root: (-root.nbytes, root.root))))
