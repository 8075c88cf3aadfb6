"""Requests for blocks: what a store is asked for, turn by turn, without the tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import BenchmarkError

ROOT = -1
"""The parent of the first block of a chain."""
FILE_BLOCK_TOKENS = 512
OPERATIONS_PER_SECOND = 1e13
BYTES_PER_SECOND = 5e9
"""What a machine computes and loads in a second, to weigh one with the other."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What decides how much K and V a token has, and what they take to compute."""

    token_bytes: int
    params: float
    layers: int
    width: int

    def operations(self, tokens: int, depth_tokens: int) -> float:
        """Return what ``tokens`` take that follow ``depth_tokens`` whose K and V are there."""
        return tokens * (2 * self.params + 4 * self.layers * self.width * (depth_tokens + tokens / 2))

    def saved_seconds(self, tokens: int, depth_tokens: int) -> float:
        """Return how much sooner these tokens are loaded than computed."""
        loading = tokens * self.token_bytes / BYTES_PER_SECOND
        return self.operations(tokens, depth_tokens) / OPERATIONS_PER_SECOND - loading


SMALL = ModelSize(23_040, 135e6, 30, 576)
MEDIUM = ModelSize(131_072, 8e9, 32, 4096)
LARGE = ModelSize(327_680, 70e9, 80, 8192)
WIDE = ModelSize(196_608, 1.4e9, 24, 2048)
"""A small model whose queries have K and V each of their own: of more bytes than those of ``MEDIUM``."""


@dataclass(slots=True)
class Trace:
    """Requests, each the numbers of the blocks of its chain in order, and what is known of each block by its number.

    Attributes:
        requests: in the order in which they arrive.
        parents: the number of the block before, or ``ROOT``.
        tokens: ids of the block alone.
        depths: tokens before it in its chain.
        sizes: bytes.
        operations: what it takes to compute the block when all before it is there.
        saved_seconds: how much sooner it is loaded than computed.
    """

    requests: list[Sequence[int]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    operations: list[float] = field(default_factory=list)
    saved_seconds: list[float] = field(default_factory=list)

    def add_block(self, parent: int, tokens: int, model: ModelSize) -> int:
        """Add a block that follows ``parent``; return its number."""
        depth = 0 if parent == ROOT else self.depths[parent] + self.tokens[parent]
        self.parents.append(parent)
        self.tokens.append(tokens)
        self.depths.append(depth)
        self.sizes.append(tokens * model.token_bytes)
        self.operations.append(model.operations(tokens, depth))
        self.saved_seconds.append(model.saved_seconds(tokens, depth))
        return len(self.parents) - 1

    def count_bytes_by_blocks(self) -> None:
        """Give all blocks one byte, so that a capacity is a number of blocks."""
        self.sizes = [1] * len(self.sizes)


def read_trace(path: Path, most_requests: int | None = None) -> Trace:
    """Read a trace in the format of the Mooncake project; all blocks take one byte.

    Each line is a JSON object with ``input_length`` (tokens) and ``hash_ids``, the ids of the prompt's blocks of 512
    tokens. Equal ids mean equal tokens up to their end.

    Raises:
        BenchmarkError: the file cannot be read, or is no such trace.
    """
    trace, numbers = Trace(), dict[int, int]()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:most_requests]
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"cannot read the trace {path}: {error}") from error
    for at, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            ids, length = [int(each) for each in fields["hash_ids"]], int(fields["input_length"])
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(f"{path}, line {at}: no request with input_length and hash_ids") from error
        chain: list[int] = []
        for place, each in enumerate(ids):
            parent = chain[-1] if chain else ROOT
            if each not in numbers:
                tokens = min(FILE_BLOCK_TOKENS, length - place * FILE_BLOCK_TOKENS)
                if tokens < 1:
                    raise BenchmarkError(f"{path}, line {at}: more blocks than {length} tokens make")
                numbers[each] = trace.add_block(parent, tokens, MEDIUM)
            elif trace.parents[numbers[each]] != parent:
                raise BenchmarkError(f"{path}, line {at}: block {each} follows another one than before")
            chain.append(numbers[each])
        trace.requests.append(chain)
    if not trace.parents:
        raise BenchmarkError(f"{path} holds no requests")
    trace.count_bytes_by_blocks()
    return trace
