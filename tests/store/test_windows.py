"""Window blocks in a store: kept beside blocks of a chain, found as spans, restored for the sliding layers alone."""

from __future__ import annotations

import json
from concurrent.futures import Future

import pytest
import torch

from kvtier import PrefixStore
from kvtier.errors import ArchiveError, StoreError, UnavailableError, UnknownNameError
from kvtier.store.format.archive import Archive
from tests.support.dict_tier import DictTier
from tests.support.stores import ROOT, count, ids, same_bits
from tests.support.windows import SLIDING, check_restored, found, keep, pages

SIZE = 4


def check(store, tokens, root=ROOT, slides=SLIDING):
    match = store.match(root, tokens)
    check_restored(store, match, store.windows(root, tokens, match), tokens, root, slides)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 11)], [(0, 11)]),
        ([(4, 11)], [(4, 11)]),
        ([(3, 11)], [(4, 11)]),
        ([(5, 11)], [(8, 11)]),
        ([(5, 10)], []),
        ([(0, 4), (8, 11)], [(0, 4), (8, 11)]),
        ([(0, 6), (6, 11)], [(0, 4), (8, 11)]),
        ([], []),
    ],
)
def test_blocks_within_a_span_get_window_blocks(reopened, spans, expected):
    make, again = reopened
    store = make()
    assert keep(store, count(11), *spans) == 11
    store = again(store)
    assert found(store, count(14)) == expected
    check(store, count(11))


def test_windows_are_cut_to_the_match(reopened):
    make, again = reopened
    store = make()
    keep(store, count(11), (0, 11))
    store = again(store)
    for limit in range(12):
        assert found(store, count(14), limit=limit) == ([(0, limit)] if limit else [])
    assert found(store, ids(0, 1, 2, 3, 4, 5, 77, 78)) == [(0, 6)]
    assert found(store, ids(0, 1, 77)) == [(0, 2)]
    assert found(store, ids(77)) == []
    check(store, ids(0, 1, 2, 3, 4, 5, 77, 78))


def test_shorter_window_tail_is_found_beside_a_longer_block(reopened):
    """The block of a later turn replaces the tail, and no window block replaces its window block."""
    make, again = reopened
    store = make()
    keep(store, count(6), (0, 6))
    keep(store, count(7))
    store = again(store)
    assert found(store, count(9)) == [(0, 6)]
    assert found(store, count(9), limit=5) == [(0, 5)]
    check(store, count(7))


def test_longer_window_tail_replaces_shorter_ones_and_never_blocks(reopened):
    make, again = reopened
    store = make()
    keep(store, count(5), (4, 5))
    store.flush()
    keep(store, count(7), (4, 7))
    store = again(store)
    assert found(store, count(9)) == [(4, 7)]
    assert store.stats().tiers[-1].blocks == 3  # a full block, a tail and its window block
    keep(store, count(8), (4, 8))
    store = again(store)
    assert found(store, count(9)) == [(4, 8)]
    assert store.stats().tiers[-1].blocks == 3
    check(store, count(8))


def test_windows_are_kept_once_and_do_not_count_as_new(reopened):
    make, again = reopened
    store = make()
    assert keep(store, count(11)) == 11
    store = again(store)
    assert keep(store, count(11), (0, 11)) == 0
    store = again(store)
    assert found(store, count(11)) == [(0, 11)]
    reads = store.stats().tiers[-1].blocks
    keep(store, count(10), (0, 10))
    assert store.stats().tiers[-1].blocks == reads == 6


def test_checkpoints_get_window_blocks(reopened):
    make, again = reopened
    store = make()
    states = {position: torch.full((8,), position, dtype=torch.uint8) for position in (3, 6, 7)}
    assert keep(store, count(7), (0, 7), states=states) == 4
    store = again(store)
    assert [position for position, _ in store.checkpoints(ROOT, count(9), 8)] == [7, 6, 3]
    assert found(store, count(9)) == [(0, 7)]
    ((position, checkpoint), *_) = store.checkpoints(ROOT, count(9), 8)
    windows = store.windows(ROOT, count(9), store.match(ROOT, count(9), position))
    job = store.restore([()], [checkpoint], [windows])
    assert torch.equal(job.states(0), states[7])
    assert job.spans(0, 0) == []
    assert job.spans(0, 1) == list(windows)
    job.close()


def test_model_whose_layers_all_slide(reopened):
    make, again = reopened
    store = make()
    keep(store, count(11), (4, 11), slides=(0, 1, 2))
    store = again(store)
    assert store.match(ROOT, count(20)).length == 11
    assert found(store, count(20)) == [(4, 11)]
    match = store.match(ROOT, count(11))
    windows = store.windows(ROOT, count(11), match)
    check_restored(store, match, windows, count(11), slides=(0, 1, 2))
    job = store.restore([()], windows=[windows])
    assert job.nbytes == 3 * 7 * 64
    job.close()


# --- names, forgetting, archives --------------------------------------------------------------------------------------


def named(store, tokens, *spans, name="chat", pin=True, root=ROOT):
    keep(store, tokens, *spans, root=root)
    return store.name(name, root, tokens, pin=pin)


@pytest.mark.parametrize(("spans", "expected"), [([(4, 10)], [(4, 10)]), ([(0, 4), (8, 10)], [(8, 10)])])
def test_pinned_name_keeps_the_windows_that_end_it(reopened, spans, expected):
    """A window block before a hole is of no use at the end of the prefix, and is kept like all others."""
    make, again = reopened
    store = make()
    record = named(store, count(10), *spans)
    assert record.tokens == record.kept_tokens == 10
    if store.path is not None:
        store = again(store)
    store.prune(to_bytes=0)
    assert found(store, count(20)) == expected
    check(store, count(10))
    assert store.named("chat").kept_tokens == 10
    assert store.tokens_of("chat").tolist() == count(10).tolist()
    usage = store.usage()
    assert store.named("chat").nbytes == store.named("chat").own_bytes == usage.nbytes
    assert usage.unnamed_bytes == 0
    store.unpin("chat")
    store.prune(to_bytes=0)
    assert store.usage().nbytes == 0


def test_name_without_a_window_at_its_end_has_none(reopened):
    make, _ = reopened
    store = make()
    named(store, count(10), (0, 8))
    store.prune(to_bytes=0)
    assert found(store, count(20)) == []


@pytest.mark.parametrize("longer", [11, 12, 13])
def test_named_window_is_replaced_by_a_longer_one(reopened, longer):
    make, again = reopened
    store = make()
    named(store, count(10), (4, 10))
    store.flush()
    keep(store, count(longer), (8, longer))
    store.flush()
    store = again(store)
    store.prune(to_bytes=0)
    assert found(store, count(10)) == [(4, 10)]
    check(store, count(10))


def test_chain_is_named_with_its_windows(reopened):
    make, again = reopened
    store = make()
    keep(store, count(10), (0, 10))
    store.flush()
    (chain,) = store.chains()
    store.name_chain(chain.key, "chat", pin=True)
    store.prune(to_bytes=0)
    store = again(store)
    assert found(store, count(20)) == [(0, 10)]


def test_listings_count_tokens_of_chains_and_bytes_of_everything(reopened):
    make, _ = reopened
    store = make()
    keep(store, count(10), (4, 10))
    store.flush()
    (chain,) = store.chains()
    assert (chain.tokens, chain.nbytes) == (10, store.usage().nbytes)
    assert store.usage().roots[0].blocks == store.stats().tiers[-1].blocks == 5


def test_chain_of_a_checkpoint_counts_its_window(reopened):
    make, _ = reopened
    store = make()
    keep(store, count(6), (0, 6), states={6: torch.zeros(8, dtype=torch.uint8)})
    store.flush()
    (chain,) = store.chains()
    assert (chain.tokens, chain.nbytes) == (6, store.usage().nbytes)


def test_window_block_is_no_chain(reopened):
    """No key of a window block names or forgets anything."""
    make, _ = reopened
    store = make()
    keep(store, count(3), (0, 3))
    store.flush()
    (window,) = store.windows(ROOT, count(3), store.match(ROOT, count(3)))
    with pytest.raises(UnknownNameError):
        store.name_chain(window.block.key, "chat")
    with pytest.raises(UnknownNameError):
        store.forget_chain(window.block.key)


@pytest.mark.parametrize("by", ["name", "chain", "ids"])
def test_forgetting_removes_the_windows_of_a_chain(reopened, by):
    make, _ = reopened
    store = make()
    keep(store, count(2), (0, 2))
    store.flush()
    keep(store, count(6), (4, 6))
    named(store, count(11), (0, 4), (8, 11), pin=False)
    if by == "name":
        store.forget("chat")
    elif by == "chain":
        store.unname("chat")
        store.forget_chain(store.chains()[0].key)
    else:
        store.forget(count(1))
    assert store.usage().nbytes == 0


@pytest.mark.parametrize("by", ["name", "chain", "ids"])
def test_forgetting_keeps_windows_that_another_chain_uses(reopened, by):
    make, again = reopened
    store = make()
    other = ids(0, 1, 2, 3, 4, 77, 78, 79, 80)
    keep(store, other, (0, 9))
    named(store, count(10), (0, 10), pin=False)
    before = store.usage()
    assert before.roots[0].blocks == 10
    if by == "name":
        forgotten = store.forget("chat")
    elif by == "chain":
        (chain,) = (chain for chain in store.chains() if chain.names)
        store.unname("chat")
        forgotten = store.forget_chain(chain.key)
    else:
        forgotten = store.forget(count(10))
    assert forgotten.blocks == 4
    assert forgotten.nbytes == before.nbytes - store.usage().nbytes
    store = again(store)
    assert found(store, count(10)) == [(0, 5)]  # ids of the other chain
    assert found(store, other) == [(0, 9)]
    check(store, other)


def test_forgetting_keeps_windows_and_checkpoints_of_another_name(reopened):
    make, again = reopened
    store = make()
    states = {2: torch.zeros(8, dtype=torch.uint8)}
    keep(store, count(2), (0, 2), states=states)
    store.name("short", ROOT, count(2))
    keep(store, count(4))
    store.name("long", ROOT, count(4))
    store.forget("long")
    store = again(store)
    assert [position for position, _ in store.checkpoints(ROOT, count(4), 4)] == [2]
    assert found(store, count(2)) == [(0, 2)]
    assert {each.name for each in store.names()} == {"short"}


def test_forgetting_ids_keeps_the_name_of_a_chain_that_stays(reopened):
    """A window block of a chain that another one goes on from is no part of the forgotten ids."""
    make, _ = reopened
    store = make()
    named(store, count(8), (0, 8))
    keep(store, ids(0, 1, 2, 3, 77), (4, 5))
    store.forget(ids(0, 1, 2, 3, 77))
    assert [each.name for each in store.names()] == ["chat"]
    assert found(store, count(8)) == [(0, 8)]
    assert store.match(ROOT, ids(0, 1, 2, 3, 77)).length == 4


@pytest.mark.parametrize("lost", ["all", "windows"])
@pytest.mark.parametrize("by", ["name", "chain", "ids"])
def test_forgetting_removes_windows_that_only_a_lower_tier_has(by, lost):
    tier = DictTier()
    with PrefixStore(block_size=SIZE, lower_tiers=[tier]) as store:
        named(store, count(8), (0, 8), pin=False)
        store.flush()
        assert sum(block.id.is_window for block in tier.blocks.values()) == 2
        host = store._tiers.host
        host.discard_all([entry.key for entry in host.entries() if lost == "all" or entry.is_window])
        assert found(store, count(8)) == [(0, 8)]
        if by == "name":
            store.forget("chat")
        elif by == "chain":
            store.unname("chat")
            store.forget_chain(store.chains()[0].key)
        else:
            store.forget(count(8))
        assert not tier.blocks


def test_windows_below_that_cannot_be_read_are_reported(monkeypatch):
    tier = DictTier()
    with PrefixStore(block_size=SIZE, lower_tiers=[tier]) as store:
        named(store, count(4), (0, 4), pin=False)
        store.flush()
        store._tiers.host.discard_all([entry.key for entry in store._tiers.host.entries()])
        with monkeypatch.context() as patched:
            patched.setattr(tier, "answer", lambda value: answer_with(UnavailableError("away")))
            with pytest.raises(StoreError, match="cannot be read now"):
                store.forget("chat")


def answer_with(error):
    future = Future()
    future.set_exception(error)
    return future


@pytest.mark.sample(12)  # of 48
@pytest.mark.parametrize("length", [6, 8, 11])
@pytest.mark.parametrize("spans", [[(0, 11)], [(4, 11)], [(0, 4), (8, 11)], []], ids=str)
@pytest.mark.parametrize("slides", [SLIDING, (0, 1, 2)], ids=["some", "all"])
@pytest.mark.parametrize("with_states", [False, True], ids=["no-states", "states"])
def test_archive_carries_the_windows_that_end_it(tmp_path, length, spans, slides, with_states):
    tokens = count(length)
    states = {length: torch.zeros(8, dtype=torch.uint8)} if with_states else None
    spans = [(start, min(stop, length)) for start, stop in spans if start < length]
    file = tmp_path / "chat.safetensors"
    with PrefixStore(tmp_path / "a", block_size=SIZE) as store:
        keep(store, tokens, *spans, states=states, slides=slides)
        store.name("chat", ROOT, tokens)
        ranges = found(store, tokens)
        store.export("chat", file)
    with PrefixStore(tmp_path / "b", block_size=SIZE, compression="zstd") as store:
        assert store.import_(file).kept_tokens == length
        assert found(store, count(20)) == [each for each in ranges if each[1] == length]
        check(store, count(20), slides=slides)
        assert [position for position, _ in store.checkpoints(ROOT, count(20), 19)] == [length] * with_states
        store.export("chat", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_archive_of_a_part_of_longer_blocks(tmp_path):
    """The name ends within the tail that a longer turn has left."""
    file = tmp_path / "chat.safetensors"
    with PrefixStore(tmp_path / "a", block_size=SIZE) as store:
        named(store, count(6), (0, 6))
        keep(store, count(7), (0, 7))
        store.export("chat", file)
    with Archive(file) as archive:
        assert (archive.window_start, len(archive.tokens)) == (0, 6)
        archive.check()
        for start, stop in ((0, 6), (1, 3)):
            for window in (False, True):
                read = archive.window_pages if window else archive.pages
                expected = pages(ROOT, count(6), start, stop, window=window)
                for page, other in zip(read(start, stop), expected, strict=True):
                    assert same_bits(page.k_htd, other.k_htd)
                    assert same_bits(page.v_htd, other.v_htd)
    with PrefixStore(tmp_path / "b", block_size=SIZE) as store:
        store.import_(file)
        assert found(store, count(9)) == [(0, 6)]
        check(store, count(9))


@pytest.mark.parametrize(
    "windows",
    ["", "[]", "{}", '{"start":4}', '{"start":8,"layers":[1,2]}', '{"start":-1,"layers":[1,2]}',
     '{"start":true,"layers":[1,2]}', '{"start":4,"layers":[]}', '{"start":4,"layers":[1,3]}',
     '{"start":4,"layers":[1]}', '{"start":4,"layers":[0,1,2]}', '{"start":3,"layers":[1,2]}',
     '{"start":4,"layers":[1,true]}', '{"start":4,"layers":{"1":2}}', '{"start":4,"layers":[1,2],"more":1}',
     '{"start":4,"layers":' + "[" * 9000, None],
)  # fmt: skip
def test_archive_with_unsound_windows_is_refused(tmp_path, windows):
    file = tmp_path / "chat.safetensors"
    with PrefixStore(block_size=SIZE) as store:
        named(store, count(8), (4, 8))
        store.export("chat", file)
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert json.loads(header["__metadata__"].pop("windows")) == {"start": 4, "layers": [1, 2]}
    if windows is not None:
        header["__metadata__"]["windows"] = windows
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + size :])
    with pytest.raises(ArchiveError, match="cannot be imported"):
        Archive(file)
