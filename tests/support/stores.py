"""Helpers of the store tests: K and V are computed from all tokens up to theirs, so that wrong bytes show."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kvtier.errors import BlockError
from kvtier.kv.page import Page, PageView
from kvtier.store import PrefixStore
from kvtier.store.block import Block
from kvtier.store.chain import BlockId, TokenIds

ROOT = "a1" * 32
OTHER_ROOT = "b2" * 32
UNIT = 4096  # bytes
LAYERS = 2
HEADS = 2
DIM = 4


def ids(*tokens: int) -> TokenIds:
    return np.array(tokens, dtype=np.int64)


def count(n: int, first: int = 0) -> TokenIds:
    return np.arange(first, first + n, dtype=np.int64)


def column(root: str, tokens: TokenIds, position: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V ``[heads, dim]`` of one token: random, and decided by the root and every token up to it."""
    text = f"{root}:{layer}:{tokens[: position + 1].tolist()}".encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:6], "little")
    both = torch.randn(2, HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    return both[0], both[1]


def truth(root: str, tokens: TokenIds, start: int, stop: int) -> tuple[Page, ...]:
    pages = []
    for layer in range(LAYERS):
        columns = [column(root, tokens, position, layer) for position in range(start, stop)]
        pages.append(Page(torch.stack([k for k, _ in columns], 1), torch.stack([v for _, v in columns], 1)))
    return tuple(pages)


def commit(store: PrefixStore, tokens: TokenIds, root: str = ROOT) -> int:
    return store.commit(root, tokens, lambda start, stop: truth(root, tokens, start, stop), {"of": "a test"})


def block(tokens: TokenIds, parent: str = ROOT, root: str = ROOT) -> Block:
    return Block(BlockId.of(root, parent, tokens), truth(root, tokens, 0, len(tokens)))


def chain(tokens: TokenIds, size: int, root: str = ROOT) -> list[Block]:
    blocks, parent = [], root
    for start in range(0, len(tokens), size):
        piece = tokens[start : start + size]
        blocks.append(Block(BlockId.of(root, parent, piece), truth(root, tokens, start, start + len(piece)), start))
        parent = blocks[-1].id.key
    return blocks


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def restored_length(store: PrefixStore, tokens: TokenIds, root: str = ROOT, limit: int | None = None) -> int:
    """Match and restore ``tokens``, check every byte, and return the number of restored tokens."""
    match = store.match(root, tokens, limit)
    if not match.spans:
        return 0
    buffers = [tuple(torch.zeros(HEADS, match.length + 3, DIM) for _ in "kv") for _ in range(LAYERS)]
    restore = store.restore([match.spans])
    try:
        restore.start(lambda layer, row: (PageView.on(*buffers[layer]), 0))
        for layer, (k_htd, v_htd) in enumerate(buffers):
            restore.wait(layer)
            expected = truth(root, tokens, 0, match.length)[layer]
            assert same_bits(k_htd[:, : match.length], expected.k_htd)
            assert same_bits(v_htd[:, : match.length], expected.v_htd)
            assert not k_htd[:, match.length :].any()
            assert not v_htd[:, match.length :].any()
    finally:
        restore.close()
    return match.length


def run_python(
    text: str, *arguments: object, options: Sequence[str] = (), timeout_seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``text`` in a new interpreter with the import path of the tests."""
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, *options, "-c", text, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )


def block_files(folder: Path) -> list[Path]:
    return sorted((folder / "blocks").rglob("*.safetensors"))


def leftovers(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tmp"))


def commit_in_another_process(folder: str, tokens: list[int]) -> int:
    """Open ``folder`` from a fresh process, commit ``tokens``, and return the number of new tokens."""
    with PrefixStore(folder, block_size=4) as store:
        return commit(store, ids(*tokens))


def read_in_another_process(folder: str, tokens: list[int]) -> int:
    """Open ``folder`` from a fresh process; return how many of ``tokens`` were restored with the right bytes."""
    with PrefixStore(folder, block_size=4) as store:
        return restored_length(store, ids(*tokens))


def restored_length_at_last(store: PrefixStore, tokens: TokenIds, root: str = ROOT, limit: int | None = None) -> int:
    """Like ``restored_length``, but match again when a block turns out to be damaged, as a turn does."""
    for _ in range(1000):  # each round costs the store a block, and no test has so many
        try:
            return restored_length(store, tokens, root, limit)
        except BlockError:
            continue
    raise AssertionError(f"a damaged block of {tokens.tolist()} is found again and again")


def bytes_in_ram(store: PrefixStore) -> int:
    """Return the size of the blocks in RAM, counted from scratch."""
    host = store._tiers.host
    counted = sum(resident.block.nbytes for resident in list(host._blocks.values()))
    assert counted == host.nbytes
    return counted


def allocated(nbytes: int) -> int:
    """Return the size of a file of ``nbytes``, in the allocation units of this machine's drives."""
    return -(-nbytes // UNIT) * UNIT


def bytes_on_disk(folder: Path) -> int:
    """Return the size of the block files, including half-written files."""
    return sum(allocated(path.stat().st_size) for path in (folder / "blocks").rglob("*") if path.is_file())


DAMAGES = ("flip", "cut", "empty", "delete")


def damage(path: Path, how: str, at: int = 0) -> None:
    """Damage a file like disks and people do: ``flip`` a bit of byte ``at``, ``cut`` there, ``empty``, ``delete``."""
    data = bytearray(path.read_bytes())
    at %= max(1, len(data))
    if how == "flip" and data:
        data[at] ^= 1 << at % 8
    elif how == "cut":
        del data[at:]
    elif how == "empty":
        data.clear()
    else:
        path.unlink()
        return
    path.write_bytes(data)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens ``a`` and ``b`` share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
