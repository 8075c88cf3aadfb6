"""A custom tier below RAM and disk: one query per turn, bounded waits, and no failed turns."""

from __future__ import annotations

import shutil
from concurrent.futures import Future

import pytest
import torch

from kvtier import PrefixStore, TieredCache
from kvtier.errors import BlockError, ConfigurationError, RestoreError, StoreError, UnavailableError
from kvtier.kv.page import PageView
from kvtier.store.block import Block
from kvtier.store.chain import BlockId
from kvtier.store.tiers.base import Presence, PutResult
from kvtier.store.tiers.lower import LONGEST_ANSWER_SECONDS, LowerTier
from tests.support.dict_tier import DictReader, DictTier, Never
from tests.support.stores import ROOT, block, block_files, chain, commit, count, restored_length

SETTINGS = {"block_size": 4, "tail_delay": 0}


@pytest.fixture
def tier():
    return DictTier()


@pytest.fixture(params=["disk", "RAM alone"])
def new_store(request, tmp_path, tier):
    """Return a function that opens an empty store above the same lower tier."""
    stores = []

    def new(**more):
        path = tmp_path / str(len(stores)) if request.param == "disk" else None
        stores.append(PrefixStore(path, **{**SETTINGS, "lower_tiers": [tier], **more}))
        return stores[-1]

    yield new
    for store in stores:
        store.close()


def test_empty_store_finds_and_restores_full_blocks_of_a_lower_tier(new_store, tier):
    tokens = count(18)
    first = new_store()
    commit(first, tokens)
    first.flush()
    assert len(tier.blocks) == 4  # without the tail block of two tokens
    assert ("flush", 1) in tier.requests
    del tier.requests[:]

    second = new_store()
    assert second.match(ROOT, tokens, limit=5).length == 5
    assert tier.requests == [("presence", 2)]
    del tier.requests[:]
    match = second.match(ROOT, tokens)
    assert match.length == 16
    second.restore([match.spans]).close()
    assert tier.requests == [("presence", 4), ("open_all", 4)]
    assert all(reader.closed for reader in tier.readers)
    assert restored_length(second, tokens) == 16
    assert second.stats().tiers[-1].hits == 8


def test_commit_stores_blocks_above_that_only_a_lower_tier_had(new_store, tier):
    tokens = count(16)
    first = new_store()
    commit(first, tokens)
    first.flush()
    second = new_store()
    commit(second, tokens)
    second.flush()
    del tier.requests[:]
    assert restored_length(second, tokens) == 16
    assert not [request for request in tier.requests if request[0] == "open_all" and request[1]]


def test_restore_continues_a_prefix_from_the_lower_tier(tmp_path, tier):
    """RAM and disk hold the beginning of the chain, the lower tier holds the rest."""
    tokens = count(16)
    with PrefixStore(tmp_path / "a", **SETTINGS, lower_tiers=[tier]) as store:
        commit(store, tokens)
    with PrefixStore(tmp_path / "b", **SETTINGS, lower_tiers=[tier]) as store:
        commit(store, count(8))
        store.flush()
        del tier.requests[:]
        load = store.restore([store.match(ROOT, tokens).spans])
        assert [load.tier(span.block.key) for span in load.spans(0, 1)] == ["host", "host", "dict", "dict"]
        load.close()
        assert tier.requests == [("presence", 2), ("open_all", 2)]


def test_generate_with_a_lower_tier_is_exact_and_counts_tokens_by_tier(make_model, generate, tokens, tmp_path, tier):
    model = make_model("llama")
    plain = generate(model, tokens(32)).sequences
    for folder, cached, below in (("a", 0, 0), ("b", 31, 31), ("b", 31, 0)):
        with TieredCache(PrefixStore(tmp_path / folder, block_size=8, lower_tiers=[tier])) as cache:
            assert generate(model, tokens(32), cache).sequences.tolist() == plain.tolist()
            assert cache.last_turn.cached_tokens == cached
            assert sum(cache.last_turn.cached_by_tier.values()) == cached
            assert cache.last_turn.cached_by_tier.get("dict", 0) == below


def test_forget_removes_prompts_from_the_lower_tier_as_well(new_store, tier):
    store = new_store()
    commit(store, count(16))
    commit(store, count(16, first=100))
    store.flush()
    store.forget(count(16))
    assert len(tier.blocks) == 4
    other = new_store()  # holds none of these blocks itself
    other.forget(count(6, first=100))
    assert not tier.blocks


@pytest.mark.parametrize("error", [OSError("away"), KeyError("oops"), BlockError("odd")])
@pytest.mark.parametrize("method", ["presence", "open_all", "put", "touch", "flush", "entries", "stats", "close"])
def test_lower_tier_errors_cost_a_recompute_and_one_warning(new_store, tier, monkeypatch, caplog, method, error):
    tokens = count(16)
    first = new_store()
    commit(first, tokens)
    first.flush()

    def fail(*args):
        raise error

    monkeypatch.setattr(tier, method, fail)
    second = new_store()
    for _ in range(3):
        found = second.match(ROOT, tokens)
        if found.spans:
            try:
                second.restore([found.spans]).close()
            except BlockError:
                found = second.match(ROOT, tokens)
        commit(second, tokens)
    second.flush()
    second.stats()
    second.usage()
    second.close()
    assert len(caplog.records) == 1
    assert "'dict'" in caplog.text
    assert len(tier.blocks) == 4  # nothing was deleted


def test_unresponsive_tier_gets_bounded_waits_and_is_skipped_for_a_while():
    now = [0.0]
    tier = DictTier(Never)
    lower = LowerTier(tier, lambda: now[0])
    del Never.waited_seconds[:]
    keys = [each.id.key for each in chain(count(8), 4)]
    assert lower.presence(keys) == [Presence.UNAVAILABLE] * 2
    assert lower.presence(keys) == [Presence.UNAVAILABLE] * 2
    assert len(tier.requests) == 1
    now[0] = 1.5
    assert all(isinstance(each, UnavailableError) for each in lower.open_all([each.id for each in chain(count(8), 4)]))
    assert len(tier.requests) == 2
    assert lower.counts == {"errors.dict": 2}
    assert len(Never.waited_seconds) == 3
    assert all(seconds <= LONGEST_ANSWER_SECONDS for seconds in Never.waited_seconds)
    now[0] = 60.0
    tier.answer = DictTier().answer
    assert lower.presence(keys) == [Presence.ABSENT] * 2


def test_reader_that_arrives_after_the_timeout_is_closed():
    (late,) = chain(count(4), 4)
    reader, future = DictReader(late), Future()
    assert future.set_running_or_notify_cancel()  # it can no longer be cancelled
    lower = LowerTier(DictTier(lambda value: future), lambda: 0.0, longest_answer_seconds=0.0)
    (found,) = lower.open_all([late.id])
    assert isinstance(found, UnavailableError)
    assert not reader.closed
    future.set_result(reader)
    assert reader.closed


def test_lower_tier_block_with_wrong_tokens_is_rejected_as_damage(new_store, tier):
    """Opening refuses the block and removes it from the lower tier. Its tokens are computed again."""
    tokens = count(8)
    first = new_store()
    commit(first, tokens)
    first.flush()
    last = list(tier.blocks)[-1]
    tier.blocks[last] = block(count(4, first=70))
    second = new_store()
    match = second.match(ROOT, tokens)
    with pytest.raises(BlockError, match="holds other tokens"):
        second.restore([match.spans])
    assert last not in tier.blocks
    assert restored_length(second, tokens) == 4


def test_unreadable_page_of_a_lower_tier_is_a_miss_and_deletes_nothing(new_store, tier, monkeypatch):
    tokens = count(8)
    first = new_store()
    commit(first, tokens)
    first.flush()

    def fail(self, *args, **more):
        raise UnavailableError("the line is dead")

    monkeypatch.setattr(DictReader, "landing", fail)
    monkeypatch.setattr(DictReader, "page", fail)
    second = new_store()
    load = second.restore([second.match(ROOT, tokens).spans])
    with pytest.raises(RestoreError, match="the line is dead"):
        load.check()
    load.close()
    assert len(tier.blocks) == 2
    assert second.match(ROOT, tokens).length == 0  # the blocks are withheld for a while


def test_tail_block_is_not_put_into_a_lower_tier(new_store, tier):
    """Tail blocks are found by an ordered search only, which a lower tier does not offer."""
    store = new_store()
    commit(store, count(3))
    store.flush()
    assert not tier.blocks
    assert not [request for request in tier.requests if request[0] == "put"]


def test_put_refused_by_a_lower_tier_does_not_affect_the_files(tmp_path, monkeypatch):
    tier = DictTier()
    monkeypatch.setattr(tier, "put", lambda block: PutResult.NO_ROOM)
    with PrefixStore(tmp_path, **SETTINGS, lower_tiers=[tier]) as store:
        commit(store, count(8))
    with PrefixStore(tmp_path, **SETTINGS) as store:
        assert store.match(ROOT, count(8)).length == 8


def test_closing_a_store_closes_its_lower_tiers(tier):
    with PrefixStore(lower_tiers=[tier], **SETTINGS):
        assert tier.closed == 0
    assert tier.closed == 1


@pytest.mark.parametrize("names", [["host"], ["disk"], ["device"], [""], [None], ["a", "a"]])
def test_lower_tier_with_a_reserved_invalid_or_duplicate_name_is_refused(names):
    tiers = []
    for name in names:
        tiers.append(DictTier())
        tiers[-1].name = name
    with pytest.raises(ConfigurationError, match="lower_tiers"):
        PrefixStore(lower_tiers=tiers)


@pytest.mark.parametrize("tiers", [DictTier(), None, {"dict": DictTier()}], ids=["one", "none", "mapping"])
def test_lower_tiers_that_are_not_a_list_are_refused(tiers):
    with pytest.raises(ConfigurationError, match="lower_tiers="):
        PrefixStore(lower_tiers=tiers)


def test_prefix_is_restored_from_a_lower_tier_after_the_folder_is_lost(tmp_path, tier):
    with PrefixStore(tmp_path / "kv", **SETTINGS, lower_tiers=[tier]) as store:
        commit(store, count(16))
    shutil.rmtree(tmp_path / "kv")
    with PrefixStore(tmp_path / "kv", **SETTINGS, lower_tiers=[tier]) as store:
        assert restored_length(store, count(16)) == 16


def test_interrupt_while_opening_lower_tier_blocks_leaves_no_lease(tmp_path, tier, monkeypatch):
    with PrefixStore(tmp_path, **SETTINGS, lower_tiers=[tier]) as store:
        commit(store, count(16))
        store.flush()
        spans = store.match(ROOT, count(16)).spans

        def interrupt(blocks):
            raise KeyboardInterrupt

        monkeypatch.setattr(tier, "open_all", interrupt)
        store._tiers.host.discard_all([spans[-1].block.key])
        store._tiers.last.discard(spans[-1].block.key)
        with pytest.raises(KeyboardInterrupt) as interrupted:
            store.restore([spans])
        assert [each.leased_blocks for each in store.stats().tiers] == [0, 0, 0]
        del interrupted  # its traceback kept every opened reader alive


@pytest.mark.parametrize(("stored", "read"), [(0, 4), (3, 4), (4, 36), (20, 36), (40, 100)])
def test_lookup_hashes_little_beyond_the_stored_chain_without_a_lower_tier(stored, read):
    """With a lower tier the whole chain is hashed, because the tier is asked for all of it at once."""
    blocks = [each.id for each in chain(count(400), 4)]
    for lower, most in (([], read), ([DictTier()], 100)):
        with PrefixStore(**SETTINGS, lower_tiers=lower) as store:
            if stored:
                commit(store, count(4 * stored))
            taken = []
            assert store._tiers.present_run(taken.append(each) or each for each in blocks) == blocks[:stored]
            assert len(taken) == most


def failing(error):
    def fail(*args, **more):
        raise error

    return fail


def test_damage_in_a_lower_tier_deletes_no_local_file(tmp_path, tier, monkeypatch):
    """A file that cannot be read now stays, even if the lower tier's copy is damaged."""
    with PrefixStore(tmp_path, **SETTINGS, lower_tiers=[tier]) as store:
        commit(store, count(16))
    monkeypatch.setattr(tier, "open_all", lambda blocks: [failed(BlockError("rotten")) for _ in blocks])
    with PrefixStore(tmp_path, **SETTINGS, lower_tiers=[tier]) as store:
        spans = store.match(ROOT, count(16)).spans
        with monkeypatch.context() as patched:
            patched.setattr(type(store._tiers.last), "_open", failing(UnavailableError("busy")))
            with pytest.raises(BlockError, match="busy"):
                store.restore([spans])
    assert len(block_files(tmp_path)) == 4
    assert not tier.blocks  # the damaged copies are removed


def failed(error):
    future = Future()
    future.set_exception(error)
    return future


def test_block_damaged_on_disk_is_read_from_the_lower_tier_and_kept_there(tmp_path, tier, caplog):
    with PrefixStore(tmp_path, **SETTINGS, lower_tiers=[tier]) as store:
        commit(store, count(16))
    victim = block_files(tmp_path)[0]
    victim.write_bytes(b"junk" * 100)
    with PrefixStore(tmp_path, **SETTINGS, lower_tiers=[tier]) as store:
        assert restored_length(store, count(16)) == 16
        assert store.stats().tiers[-1].hits >= 1
    assert len(tier.blocks) == 4
    assert not victim.exists()
    assert "it is read from the tier 'dict'" in caplog.text


@pytest.mark.parametrize("what", ["parent", "checkpoint", "window"])
def test_lower_tier_block_of_another_chain_or_kind_is_refused(new_store, tier, what):
    """The same token ids at another place have different K and V."""
    tokens = count(8)
    first = new_store()
    commit(first, tokens)
    first.flush()
    second_key, (_, second) = list(tier.blocks)[1], tier.blocks.values()
    identity = second.id
    other = BlockId.of(ROOT, "77" * 32, identity.tokens) if what == "parent" else getattr(identity, what)
    tier.blocks[second_key] = Block(other, second.pages, second.depth_tokens)
    store = new_store()
    with pytest.raises(BlockError, match="holds other tokens"):
        store.restore([store.match(ROOT, tokens).spans])
    assert second_key not in tier.blocks


@pytest.mark.parametrize("error", [ConnectionError("cut off"), KeyError("oops"), BlockError("rotten")])
@pytest.mark.parametrize("method", ["page", "landing", "land"])
def test_failing_reader_of_a_lower_tier_costs_a_recompute(new_store, tier, monkeypatch, method, error):
    tokens = count(8)
    first = new_store()
    commit(first, tokens)
    first.flush()
    if method == "land":
        monkeypatch.setattr(DictReader, "landing", lambda *args, **more: failing(error))
    else:
        monkeypatch.setattr(DictReader, method, failing(error))
    monkeypatch.setattr(DictReader, "close", failing(OSError("closing")))
    second = new_store()
    load = second.restore([second.match(ROOT, tokens).spans])
    if method == "page":
        with pytest.raises(RestoreError):
            load.check()
    else:
        k = torch.zeros(2, 8, 4)
        with pytest.raises(RestoreError):
            load.land(0, lambda layer, row: (PageView.on(k, k), 0))
    load.close()
    assert commit(second, tokens) == 8


def test_forget_removes_blocks_that_only_the_lower_tier_still_has(tier):
    """RAM has dropped the blocks. Forgetting works by name, and by token ids even if the first block is lost."""
    small = {"block_size": 4, "tail_delay": 0, "lower_tiers": [tier]}
    with PrefixStore(**small) as store:
        commit(store, count(16))
        store.name("secret", ROOT, count(16))
        store.flush()
        store._tiers.host.shrink(0)
        for key in list(store._tiers.host.entries()):
            store._tiers.host.discard(key.key)
        assert len(tier.blocks) == 4
        store.forget("secret")
        assert not tier.blocks
        commit(store, count(16, first=50))
        store.flush()
        store._tiers.host.discard_all([entry.key for entry in store._tiers.host.entries()])
        tier.blocks.popitem(last=False)
        store.forget(count(6, first=50))
        assert not tier.blocks


@pytest.mark.parametrize("method", ["entries", "discard_all"])
def test_forget_raises_when_a_lower_tier_fails_and_can_be_repeated(new_store, tier, monkeypatch, method):
    store = new_store()
    commit(store, count(16))
    store.flush()
    monkeypatch.setattr(tier, method, failing(OSError("away")))
    with pytest.raises(StoreError, match="'dict'"):
        store.forget(count(16))
    monkeypatch.undo()
    store._tiers._lower[0]._backoff.end()
    store.forget(count(16))
    assert not tier.blocks


def test_blocks_whose_put_failed_are_put_below_by_later_commits(new_store, tier, monkeypatch):
    store = new_store()
    with monkeypatch.context() as patched:
        patched.setattr(tier, "put", failing(OSError("away")))
        commit(store, count(16))
        store.flush()
    assert not tier.blocks
    store._tiers._lower[0]._backoff.end()
    for _ in range(2):
        commit(store, count(16))
        store.flush()
    assert len(tier.blocks) == 4


def test_write_on_second_use_applies_to_the_lower_tier(new_store, tier):
    store = new_store(write_on="second-use")
    commit(store, count(16))
    store.flush()
    assert not tier.blocks
    commit(store, count(16))
    store.flush()
    assert len(tier.blocks) == 4


def test_chain_larger_than_ram_is_put_into_the_lower_tier_whole(tier):
    with PrefixStore(**SETTINGS, host_budget=3 * block(count(4)).nbytes, lower_tiers=[tier]) as store:
        for _ in range(2):
            commit(store, count(64))
            store.flush()
        assert len(tier.blocks) == 16


def test_backoff_grows_per_failure_and_only_the_failed_call_resets_it():
    now = [0.0]
    tier = DictTier()
    lower = LowerTier(tier, lambda: now[0])
    blocks = [each.id for each in chain(count(64), 4)]
    for pause in (1, 2, 4, 8):
        tier.open_all = lambda asked: [failed(OSError("away")) for _ in asked]
        assert all(isinstance(each, UnavailableError) for each in lower.open_all(blocks))
        asked = len(tier.requests)
        now[0] += pause - 0.1
        lower.presence(["a"])
        assert len(tier.requests) == asked
        now[0] += 0.2
        lower.presence(["a"])  # presence works, which says nothing about opening
        assert len(tier.requests) == asked + 1
    del tier.open_all
    assert lower.open_all(blocks) == [None] * 16
    tier.open_all = lambda asked: [failed(OSError("away")) for _ in asked]
    lower.open_all(blocks)
    now[0] += 1.1
    asked = len(tier.requests)
    lower.presence(["a"])
    assert len(tier.requests) == asked + 1


def test_waits_for_a_lower_tier_share_one_time_allowance():
    """Waiting shortens the next wait, so all rows of a turn wait no longer than one. Other time restores it."""
    asked = []

    class Slow(Future):
        def result(self, timeout=None):
            asked.append(timeout)
            return []

    lower = LowerTier(DictTier(lambda value: Slow()), lambda: 0.0)
    lower._allowance_seconds = 0.25  # as if 1.75 s had been spent waiting a moment ago
    lower._wait(Slow())
    assert 0.25 <= asked[0] < 0.5
    lower._waited_until -= 60.0
    lower._wait(Slow())
    assert asked[1] == LONGEST_ANSWER_SECONDS


def test_manifest_of_an_imported_root_is_kept_without_a_folder(tmp_path, tier):
    with PrefixStore(tmp_path / "kv", **SETTINGS) as store:
        tokens = count(8)
        store.commit(ROOT, tokens, lambda start, stop: block(tokens[start:stop]).pages, {"of": "a test"})
        store.name("it", ROOT, tokens)
        store.export("it", tmp_path / "it.safetensors")
    with PrefixStore(**SETTINGS, lower_tiers=[tier]) as store:
        store.import_(tmp_path / "it.safetensors")
        store.flush()
        assert store._block_writer.manifest(ROOT) == {"of": "a test"}


def test_match_with_a_limit_of_zero_or_no_tokens_finds_nothing(new_store):
    store = new_store()
    commit(store, count(8))
    for limit in (0, -1):
        assert store.match(ROOT, count(8), limit=limit).length == 0
    assert store.match(ROOT, count(0)).length == 0
