"""Buffers that share memory hold the same values as separate buffers, under any sequence of operations."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvtier.kv.buffer import KVBuffer
from kvtier.kv.page import Page
from kvtier.kv.spec import LayerSpec

K_HEADS, V_HEADS, K_DIM, V_DIM = 2, 1, 3, 2
GEOMETRY = LayerSpec(K_HEADS, K_DIM, V_HEADS, V_DIM, torch.float32)
places = st.integers(0, 99)


@dataclass(eq=False)
class Pair:
    """A buffer and its expected contents, in unshared tensors."""

    buffer: KVBuffer
    k: torch.Tensor
    v: torch.Tensor

    @property
    def length(self) -> int:
        return self.k.shape[2]


class Forks(RuleBasedStateMachine):
    """Every buffer beside its deep copy."""

    def __init__(self):
        super().__init__()
        self.pairs: list[Pair] = []
        self.made = 0

    def states(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V with values that occur nowhere else."""
        k = torch.arange(rows * K_HEADS * columns * K_DIM, dtype=torch.float32) + self.made
        v = -torch.arange(rows * V_HEADS * columns * V_DIM, dtype=torch.float32) - self.made
        self.made += 10_000
        return k.view(rows, K_HEADS, columns, K_DIM), v.view(rows, V_HEADS, columns, V_DIM)

    def pair(self, which: int, forked: bool = False) -> Pair:
        """Return a pair; with ``forked``, share its buffer first."""
        pair = self.pairs[which % len(self.pairs)]
        if forked:
            self.add(pair, pair.buffer.share(pair.length))
        return pair

    def add(self, pair: Pair, buffer: KVBuffer) -> None:
        self.pairs.append(Pair(buffer, pair.k.clone(), pair.v.clone()))
        if len(self.pairs) > 5:
            self.pairs.remove(next(other for other in self.pairs if other is not pair))

    @initialize(rows=st.integers(1, 3), columns=st.integers(0, 20), capacity=st.integers(20, 60))
    def begin(self, rows, columns, capacity):
        k, v = self.states(rows, columns)
        buffer = KVBuffer(rows, GEOMETRY, capacity, "cpu")
        buffer.append(0, k, v, 0)
        self.pairs.append(Pair(buffer, k, v))

    @rule(which=places)
    def fork(self, which):
        pair = self.pair(which)
        self.add(pair, pair.buffer.share(pair.length))

    @rule(which=places)
    def copy(self, which):
        self.add(self.pair(which), copy.deepcopy(self.pair(which).buffer))

    @rule(which=places, forked=st.booleans(), columns=st.integers(1, 8))
    def append(self, which, forked, columns):
        pair = self.pair(which, forked)
        k, v = self.states(pair.buffer.rows, columns)
        begin = pair.length
        pair.k, pair.v = torch.cat([pair.k, k], 2), torch.cat([pair.v, v], 2)
        seen = pair.buffer.append(begin, k, v, begin // 2)
        assert torch.equal(seen[0], pair.k[:, :, begin // 2 :])
        assert torch.equal(seen[1], pair.v[:, :, begin // 2 :])

    @rule(which=places, removed=st.integers(1, 12))
    def crop(self, which, removed):
        pair = self.pair(which)
        length = max(0, pair.length - removed)
        pair.k, pair.v = pair.k[:, :, :length], pair.v[:, :, :length]

    @rule(which=places, forked=st.booleans(), chosen=st.lists(places, min_size=1, max_size=4))
    def select(self, which, forked, chosen):
        pair = self.pair(which, forked)
        rows = torch.tensor([row % pair.buffer.rows for row in chosen])
        pair.buffer.select(rows, pair.length)
        pair.k, pair.v = pair.k[rows], pair.v[rows]

    @rule(which=places, columns=st.integers(1, 80))
    def reserve(self, which, columns):
        pair = self.pair(which)
        pair.buffer.reserve(columns, live=pair.length)
        assert pair.buffer.capacity >= columns

    @rule(
        which=places,
        forked=st.booleans(),
        row=places,
        at=places,
        columns=st.integers(1, 5),
        how=st.sampled_from(["put", "land", "clear"]),
    )
    def overwrite(self, which, forked, row, at, columns, how):
        """Overwrite some columns of a row, as restoring a prefix does; the rest stays."""
        pair = self.pair(which, forked)
        row, begin = row % pair.buffer.rows, at % (pair.length + 1)
        end = min(begin + columns, pair.length)
        k, v = (states[0, :, : end - begin] for states in self.states(1, columns))
        if how == "clear":
            k, v = torch.zeros_like(k), torch.zeros_like(v)
            pair.buffer.clear(row, begin, end)
        elif how == "put":
            pair.buffer.put(row, begin, Page(k, v))
        else:
            view = pair.buffer.view(row, begin).cut(0, end - begin)
            view.take(Page(k.contiguous(), v.contiguous()), 0, end - begin)
        pair.k, pair.v = pair.k.clone(), pair.v.clone()
        pair.k[row, :, begin:end], pair.v[row, :, begin:end] = k, v

    @rule(to=places, source=places, rows=st.tuples(places, places), at=st.tuples(places, places), columns=places)
    def copy_columns(self, to, source, rows, at, columns):
        target, source = self.pair(to), self.pair(source)
        if target is source:  # a buffer copies only from other buffers
            return
        row, source_row = rows[0] % target.buffer.rows, rows[1] % source.buffer.rows
        begin, source_begin = at[0] % (target.length + 1), at[1] % (source.length + 1)
        count = min(columns % 9, target.length - begin, source.length - source_begin)
        target.buffer.copy(row, begin, begin + count, source.buffer, source_row, source_begin)
        k = source.k[source_row, :, source_begin : source_begin + count].clone()
        v = source.v[source_row, :, source_begin : source_begin + count].clone()
        target.k, target.v = target.k.clone(), target.v.clone()
        target.k[row, :, begin : begin + count], target.v[row, :, begin : begin + count] = k, v

    @rule(which=places)
    def close(self, which):
        if len(self.pairs) > 1:
            self.pairs.pop(which % len(self.pairs)).buffer.close()

    @invariant()
    def all_hold_what_they_should(self):
        for pair in self.pairs:
            k, v = pair.buffer.contents(pair.length)
            assert torch.equal(k, pair.k)
            assert torch.equal(v, pair.v)


TestForks = Forks.TestCase
TestForks.settings = settings(max_examples=2 * settings().max_examples, stateful_step_count=30)
