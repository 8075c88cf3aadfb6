"""Computing the front while the end loads: the steps of the meeting, and whole turns over a tier that is held up."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from kvtier import PrefixStore, TieredCache
from kvtier.costs.prefill import PrefillCost, PrefillSample
from kvtier.costs.transfer import TransferCost, TransferSample
from kvtier.errors import UnavailableError
from kvtier.hf.generate import run
from kvtier.hf.generate.prefill import prefill_chunk
from kvtier.hf.turn import manager
from kvtier.hf.turn.choice.decision import BOTH, Estimates
from kvtier.hf.turn.choice.estimates import machine_name
from kvtier.hf.turn.choice.meeting import Meeting
from kvtier.hf.turn.cost import COSTS
from tests.support.dict_tier import DictReader, DictTier
from tests.support.upstream import CACHE

ESTIMATES = Estimates(
    PrefillCost(1e-3, 1e-3, 1e-9, 1e-9), MappingProxyType({"far": TransferCost(0, 1e6)}), token_bytes=1000
)


class FakeFetch:
    """Arrivals by script: after each chunk or wait, so many more columns have arrived."""

    def __init__(self, end, script):
        self.arrived, self.is_stuck, self.elapsed_seconds = end, False, 0.0
        self._script = list(script)
        self.waits = []

    def step(self, seconds):
        self.elapsed_seconds += seconds
        if self._script:
            self.arrived = max(0, self.arrived - self._script.pop(0))

    def wait(self, column, seconds):
        self.waits.append((column, seconds))
        self.step(seconds)


def meet(fetch, begin, end):
    """Return the chunks that are computed."""
    meeting = Meeting(fetch, begin, end, ESTIMATES, 1.0, COSTS)
    chunks, column = [], begin
    while (to := meeting.next_chunk(column)) is not None:
        chunks.append((column, to))
        fetch.step(ESTIMATES.compute_seconds(column, to))
        column = to
    return chunks


@given(st.integers(0, 200), st.integers(1, 3000), st.lists(st.integers(0, 900), max_size=30), st.booleans())
def test_chunks_are_contiguous_and_end_where_the_rest_has_arrived(begin, more, script, stuck):
    fetch = FakeFetch(begin + more, script)
    fetch.is_stuck = stuck
    chunks = meet(fetch, begin, begin + more)
    edge = begin
    for a, b in chunks:
        assert a == edge < b <= a + COSTS.longest_chunk_tokens
        edge = b
    assert edge >= fetch.arrived or edge == begin + more
    assert edge <= begin + more
    for column, seconds in fetch.waits:  # a wait is short beside the smallest chunk
        assert seconds <= 1.6 * ESTIMATES.compute_seconds(column, column + COSTS.shortest_chunk_tokens)
    assert not (stuck and fetch.waits)


def test_a_tier_that_hangs_is_not_waited_for_long_and_everything_is_computed():
    fetch = FakeFetch(1000, [])
    assert meet(fetch, 0, 1000)[-1][1] == 1000
    assert sum(seconds for _, seconds in fetch.waits) < 0.2 * ESTIMATES.compute_seconds(0, 1000)


def test_what_has_arrived_already_is_not_computed():
    fetch = FakeFetch(1000, [])
    fetch.arrived = 0
    assert meet(fetch, 0, 1000) == []


# --- whole turns ------------------------------------------------------------------------------------------------------

TOKENS = 96


class HeldReader(DictReader):
    def __init__(self, block, gate):
        super().__init__(block)
        self._gate = gate
        self.asked, self.was_closed = threading.Event(), threading.Event()

    def page(self, layer):
        self.asked.set()
        self._gate(self.id)
        return super().page(layer)

    def landing(self, layer, first, last, view, *, check=True):
        return partial(view.take, self.page(layer), first, last)

    def close(self):
        super().close()
        self.was_closed.set()


class HeldTier(DictTier):
    """A tier whose blocks come when ``gate`` returns for them."""

    def __init__(self, blocks, gate):
        super().__init__()
        self.blocks = blocks
        self.gate = gate

    def open_all(self, blocks):
        readers = [HeldReader(self.blocks[b.key], self.gate) if b.key in self.blocks else None for b in blocks]
        self.readers += [reader for reader in readers if reader is not None]
        return [self.answer(reader) for reader in readers]


@pytest.fixture
def stored(model, tokens, generate):
    """``stored(gate)``: a store over a tier with the blocks of a first turn, its costs set so that both ways pay."""
    tier, kept = DictTier(), []
    with PrefixStore(block_size=8, lower_tiers=[tier]) as first, TieredCache(first) as cache:
        generate(model, tokens(TOKENS), cache)
        first.flush()
        root = cache.turns.kept_row(0)[0]
        token_bytes = first.costs(root, machine_name(model.device)).token_bytes
    stores = []

    def make(gate, *, seconds_per_token=1e-3):
        held = HeldTier(tier.blocks, gate)
        store = PrefixStore(block_size=8, lower_tiers=[held])
        book = store.costs(root, machine_name(model.device))
        book.token_bytes = token_bytes
        for n in (1, 16, 64, 256):
            book.note_pass(PrefillSample(n, 0, n * seconds_per_token))
            book.note_load("dict", TransferSample(int(n * token_bytes), 0.9 * n * seconds_per_token))
        stores.append(store)
        kept.append(held)
        return store, held

    yield make
    for store in stores:
        store.close()
    for held in kept:
        assert all(reader.closed for reader in held.readers)  # no lease is left


@pytest.fixture
def chunks(monkeypatch):
    """The ``(begin, end)`` of each chunk that is fed before ``generate`` feeds the rest."""
    fed = []

    def noting(model, cache, ids, mask, begin, end):
        fed.append((begin, end))
        prefill_chunk(model, cache, ids, mask, begin, end)

    monkeypatch.setattr(run, "prefill_chunk", noting)
    return fed


def as_computed(model, ids, chunks):
    """Return K of layer 0 and V of the last layer of a ``DynamicCache`` that was fed the same chunks."""
    cache = DynamicCache(config=model.config)
    for begin, end in chunks:
        with torch.no_grad():
            model(input_ids=ids[:, begin:end], **{CACHE: cache}, position_ids=torch.arange(begin, end)[None])
    return cache.layers[0].keys, cache.layers[-1].values


def test_front_is_computed_while_the_end_loads(model, tokens, generate, stored, chunks):
    ids, half = tokens(TOKENS), threading.Event()
    front = set()
    store, held = stored(lambda block: half.wait(20) if block.key in front else None)
    chain = [block.id for block in held.blocks.values()]
    front.update(block.key for block in chain[: len(chain) // 2])
    with TieredCache(store, reuse="auto") as cache, TieredCache(PrefixStore()) as cold:
        answer, expected = generate(model, ids, cache), generate(model, ids, cold)
        half.set()
        turn, met = cache.last_turn, chunks[-1][1]
        book = store.costs(cache.turns.kept_row(0)[0], machine_name(model.device))
        assert len(book.to_dict()["passes"]) > 4  # those were set by the test
        assert turn.decision == BOTH
        assert 0 < turn.cached_tokens == turn.cached_by_tier["dict"]
        assert turn.cached_tokens + turn.computed_tokens == TOKENS
        assert turn.cached_tokens == TOKENS - 1 - met
        k, v = as_computed(model, ids, chunks)
        assert torch.equal(cache.layers[0].keys[:, :, :met], k)
        assert torch.equal(cache.layers[-1].values[:, :, :met], v)
        loaded = slice(met, met + turn.cached_tokens)
        assert torch.equal(cache.layers[-1].values[:, :, loaded], cold.layers[-1].values[:, :, loaded])
        assert torch.equal(answer.sequences, expected.sequences)


def test_progress_counts_what_is_computed_and_what_has_arrived(model, tokens, generate, stored):
    ids, events, half, front = tokens(TOKENS), [], threading.Event(), set()
    store, held = stored(lambda block: half.wait(20) if block.key in front else None)
    chain = [block.id for block in held.blocks.values()]
    front.update(block.key for block in chain[: len(chain) // 2])
    with TieredCache(store, reuse="auto", progress=events.append) as cache:
        generate(model, ids, cache)
        half.set()
        report = cache.last_turn
    prefill, load = ([event for event in events if event.kind == kind] for kind in ("prefill", "load"))
    assert 0 < report.computed_tokens < TOKENS
    assert (prefill[-1].done, prefill[-1].total, prefill[-1].ended) == (*[report.computed_tokens] * 2, True)
    assert 0 < load[-1].done == load[-1].total < load[0].total
    assert load[-1].ended


def test_a_tier_that_hangs_is_given_up_and_everything_is_computed(model, tokens, generate, stored):
    ids, never = tokens(TOKENS), threading.Event()
    store, _ = stored(lambda block: never.wait(20))
    with TieredCache(store, reuse="auto") as cache, TieredCache(PrefixStore()) as cold:
        answer = generate(model, ids, cache)
        assert cache.last_turn.cached_tokens == 0
        assert torch.equal(answer.sequences, generate(model, ids, cold).sequences)
        never.set()
        generate(model, ids, cache)
        assert cache.last_turn.cached_by_tier["device"] == TOKENS - 1


def test_each_chunk_has_run_before_the_next_is_chosen(model, tokens, generate, stored, chunks, monkeypatch):
    half, chosen = threading.Event(), []
    store, _ = stored(lambda block: half.wait(20))
    next_chunk = Meeting.next_chunk
    monkeypatch.setattr(manager, "wait_for_compute", lambda devices: chosen.append((len(chunks), *devices)))
    monkeypatch.setattr(
        Meeting, "next_chunk", lambda meeting, column: chosen.append(column) or next_chunk(meeting, column)
    )
    with TieredCache(store, reuse="auto") as cache:
        generate(model, tokens(TOKENS), cache)
        half.set()
    assert len(chunks) > 1
    after_the_first = chosen[chosen.index(chunks[0][0], 1) + 1 :]
    expected = [item for number, (_, end) in enumerate(chunks, 1) for item in ((number, model.device), end)]
    assert after_the_first == expected


def test_a_tier_that_fails_is_computed_around(model, tokens, generate, stored, warned):
    ids = tokens(TOKENS)
    bad = set()

    def gate(block):
        if block.key in bad:
            raise UnavailableError("away")

    store, held = stored(gate)
    bad.add([block.id.key for block in held.blocks.values()][3])
    with TieredCache(store, reuse="auto") as cache, TieredCache(PrefixStore()) as cold:
        answer = generate(model, ids, cache)
        turn = cache.last_turn
        assert torch.equal(answer.sequences, generate(model, ids, cold).sequences)
        assert turn.computed_tokens >= 32  # the failed block and all before it
    assert len(warned()) == 1


def test_an_interrupt_between_two_chunks_keeps_what_was_computed(model, tokens, generate, stored, monkeypatch):
    ids, never = tokens(TOKENS), threading.Event()
    store, _ = stored(lambda block: never.wait(20))
    ends = []

    def interrupted(model, cache, ids, mask, begin, end):
        if ends:
            raise KeyboardInterrupt
        ends.append(min(end, 24))
        prefill_chunk(model, cache, ids, mask, begin, ends[-1])

    with TieredCache(store, reuse="auto") as cache:
        monkeypatch.setattr(run, "prefill_chunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, cache)
        monkeypatch.undo()
        never.set()
        generate(model, ids, cache)
        assert cache.last_turn.cached_by_tier["device"] == ends[0]


def test_what_a_slow_tier_has_is_computed_and_not_read(model, tokens, generate, stored):
    asked = []
    store, _ = stored(asked.append)
    with TieredCache(store, reuse="auto") as cache:
        generate(model, tokens(8), cache)
        asked.clear()
        root = cache.turns.kept_row(0)[0]
        book = store.costs(root, machine_name(model.device))
        for n in (1, 16, 64, 256) * 5:
            book.note_load("dict", TransferSample(int(n * book.token_bytes), 10.0))
        cache.reset()
        generate(model, tokens(TOKENS), cache)
        turn = cache.last_turn
        assert turn.cached_tokens == turn.cached_by_tier["host"] == 8
        assert "tiers below were not asked" in turn.miss_reason
        assert asked == []


def test_files_are_not_read_where_computing_is_faster(model, tokens, generate, tmp_path):
    ids = tokens(TOKENS)
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store) as cache:
        generate(model, ids, cache)
        root = cache.turns.kept_row(0)[0]
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store, reuse="auto") as cache:
        book = store.costs(root, machine_name(model.device))
        assert book.knows_passes  # the other store has kept them
        for n in (1, 8, 64) * 8:
            book.note_load("disk", TransferSample(int(n * book.token_bytes), 30.0))
        generate(model, ids, cache)
        turn = cache.last_turn
        assert (turn.decision, turn.cached_tokens, turn.known_tokens) == ("compute", 0, TOKENS - 1)
        assert turn.other_ways["load"] > 29 > turn.predicted_seconds > 0
        assert "computing the prompt is expected to take" in turn.miss_reason
        generate(model, ids, cache)
        assert (cache.last_turn.decision, cache.last_turn.cached_tokens) == ("held", TOKENS - 1)


@pytest.mark.parametrize("reuse", ["auto", "always"])
def test_what_takes_far_longer_to_load_than_to_compute_is_not_written(model, tokens, generate, tmp_path, reuse):
    ids, now = tokens(TOKENS), [1e9]
    with (
        PrefixStore(tmp_path, block_size=8, clock=lambda: now[0]) as store,
        TieredCache(store, reuse=reuse) as cache,
    ):
        generate(model, ids[:, :16], cache)
        book = store.costs(cache.turns.kept_row(0)[0], machine_name(model.device))
        for n in (1, 8, 64) * 8:
            book.note_load("disk", TransferSample(int(n * book.token_bytes), 30.0 * n))
        store.flush()
        written = store.stats().written_bytes
        now[0] += 60.0  # blocks are weighed anew now and then
        generate(model, ids.flip(1), cache)
        store.flush()
        assert (store.stats().written_bytes == written) == (reuse == "auto")
        assert bool(store.stats().not_worth_writing) == (reuse == "auto")
        cache.reset()
        generate(model, ids.flip(1), cache)
        assert cache.last_turn.known_tokens == TOKENS - 1  # RAM has it


def test_always_loads_what_is_known(model, tokens, generate, stored):
    store, _ = stored(lambda block: None, seconds_per_token=1e-9)
    with TieredCache(store, reuse="always") as cache:
        generate(model, tokens(TOKENS), cache)
        assert cache.last_turn.cached_tokens >= TOKENS - 8
        assert (cache.last_turn.decision, cache.last_turn.predicted_seconds) == ("load", 0)


def test_a_load_that_takes_much_longer_than_expected_is_given_up(model, tokens, generate, stored):
    """Loading alone was decided: nothing is computed at first."""
    ids, never = tokens(TOKENS), threading.Event()
    store, _ = stored(lambda block: never.wait(20))
    with TieredCache(store, reuse="auto") as cache, TieredCache(PrefixStore()) as cold:
        cache.turns.costs = replace(COSTS, both_share=0.0, other_way_share=0.0, watched_load_seconds=0.0)
        answer = generate(model, ids, cache)
        never.set()
        turn = cache.last_turn
        assert (turn.decision, turn.cached_tokens) == ("load", 0)
        assert turn.actual_seconds > COSTS.watched_load_times * 0.09
        assert torch.equal(answer.sequences, generate(model, ids, cold).sequences)


def test_a_load_that_comes_in_time_is_not_computed(model, tokens, generate, stored, chunks):
    store, _ = stored(lambda block: None)
    with TieredCache(store, reuse="auto") as cache:
        cache.turns.costs = replace(COSTS, both_share=0.0, other_way_share=0.0, watched_load_seconds=0.0)
        generate(model, tokens(TOKENS), cache)
        assert (cache.last_turn.decision, cache.last_turn.cached_tokens, chunks) == ("load", TOKENS - 1, [])


def test_a_padded_batch_gives_up_a_load_that_hangs(model, tokens, generate, stored):
    """Its front cannot be computed while the rest loads. The thread that hangs holds up no later turn."""
    ids, never = tokens(TOKENS), threading.Event()
    padded = torch.cat([torch.cat(row, 1) for row in ((torch.zeros(1, 3, dtype=ids.dtype), ids), (ids, ids[:, :3]))])
    store, held = stored(lambda block: never.wait(20))
    with TieredCache(store, reuse="auto") as cache, TieredCache(PrefixStore()) as cold:
        cache.turns.costs = replace(COSTS, other_way_share=0.0, least_patience_seconds=0.01)
        answer = generate(model, padded, cache)
        assert any(reader.asked.is_set() for reader in held.readers)
        assert cache.last_turn.cached_tokens == 0
        assert torch.equal(answer.sequences, generate(model, padded, cold).sequences)
        for known in (0, 39):  # from RAM, by other threads
            with TieredCache(store, reuse="always") as other:
                generate(model, tokens(40, seed=9), other)
                assert other.last_turn.cached_tokens == known
        never.set()
    assert all(reader.was_closed.wait(20) for reader in held.readers)  # by a thread of its own


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("own", [(24, 24), (24, 40)], ids=["as much", "more"])
@pytest.mark.parametrize("fed", [0, 4])
def test_rows_of_a_batch_go_on_from_what_each_held(model, tokens, generate, monkeypatch, own, swapped, fed):
    """What the buffers hold moves to other rows, or differs in length; the rest is stored, and is watched."""
    rows, begun, original = [tokens(64, seed=seed)[0] for seed in (7, 8)], [], Meeting.next_chunk

    def chunk(self, column):
        begun.append(column)
        return column + fed if fed and len(begun) == 1 else original(self, column)

    monkeypatch.setattr(Meeting, "next_chunk", chunk)
    with PrefixStore(block_size=8) as store, TieredCache(store, reuse="auto") as cache:
        with TieredCache(store, reuse="always") as other:
            for row in rows:
                generate(model, row[None], other)
        longest = max(own)
        held = [torch.cat([row[:n], torch.full((longest - n,), 3)]) for row, n in zip(rows, own, strict=True)]
        generate(model, torch.stack(held), cache)
        cache.turns.costs = replace(COSTS, other_way_share=0.0, both_share=0.0, watched_load_seconds=0.0)
        batch = torch.stack(rows[::-1] if swapped else rows)
        answer = generate(model, batch, cache)
        assert cache.last_turn.cached_by_tier["host"] > 0
        with TieredCache(PrefixStore()) as cold:
            expected = generate(model, batch, cold)
            assert torch.equal(answer.sequences, expected.sequences)
            for ours, theirs in zip(cache.layers, cold.layers, strict=True):
                assert torch.allclose(ours.keys[:, :, :63], theirs.keys[:, :, :63], atol=1e-4)
                assert torch.allclose(ours.values[:, :, :63], theirs.values[:, :, :63], atol=1e-4)


def test_passes_are_timed_in_generate_and_not_in_custom_loops(model, tokens, generate):
    with PrefixStore(block_size=8) as store, TieredCache(store) as cache:
        ids = tokens(40)
        cache.begin(model, ids)
        model(ids, **{CACHE: cache})
        cache.commit(ids)
        book = store.costs(cache.turns.kept_row(0)[0], machine_name(model.device))
        assert not book.knows_passes
        generate(model, tokens(30, seed=4), cache)
        passes = [(tokens, depth) for tokens, depth, _, _ in book.to_dict()["passes"]]
        assert passes[0] == (30, 0)
        assert all(tokens == 1 for tokens, _ in passes[1:])
