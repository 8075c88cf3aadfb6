"""Names, pins, expiry, forgetting, pruning, archives and statistics of a store."""

import json
import shutil

import numpy as np
import pytest
import torch

from kvtier import (
    ArchiveError,
    ClosedError,
    ConfigurationError,
    PrefixStore,
    PromptError,
    StoreError,
    TieredCache,
    UnknownNameError,
)
from kvtier.testing.faults import Faults
from tests.support.stores import (
    OTHER_ROOT,
    ROOT,
    UNIT,
    block_files,
    commit,
    count,
    ids,
    restored_length,
    restored_length_at_last,
)
from tests.support.upstream import CACHE


class Clock:
    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture(params=["ram", "disk"])
def place(request, tmp_path):
    return {"path": tmp_path / "store"} if request.param == "disk" else {}


def new_store(place, **settings):
    return PrefixStore(**place, block_size=4, **settings)


def test_named_prefix_reports_its_tokens_sizes_tiers_and_hits(place):
    clock = Clock()
    with new_store(place, clock=clock) as store:
        commit(store, count(10))
        commit(store, ids(0, 1, 2, 3, 9, 9))
        store.flush()
        found = store.name("a chat", ROOT, count(10))
        assert found == store.named("a chat")
        (named,) = store.names()
        assert (named.name, named.root, named.tokens, named.kept_tokens) == ("a chat", ROOT, 10, 10)
        assert 0 < named.own_bytes < named.nbytes  # the first block is shared
        assert sum(named.tokens_by_tier.values()) == 10
        assert (named.created_at, named.pinned, named.expires_at, named.hits) == (clock.now, False, None, 0)
        assert store.tokens_of("a chat").tolist() == count(10).tolist()
        restored_length(store, count(10))
        commit(store, count(10))
        store.flush()
        assert store.named("a chat").hits == 1


def test_name_keeps_its_tokens_when_its_tail_block_grows(place):
    with new_store(place) as store:
        commit(store, count(6))
        store.name("chat", ROOT, count(6), pin=True)
        commit(store, count(13))
        store.flush()
        named = store.named("chat")
        assert (named.tokens, named.kept_tokens, named.pinned) == (6, 6, True)
        assert store.tokens_of("chat").tolist() == list(range(6))
        store.name("chat", ROOT, count(13))
        assert (store.named("chat").tokens, store.named("chat").pinned) == (13, True)


@pytest.mark.parametrize("name", ["", " ", " a", "a ", "a\nb", "a\0", "x" * 201, 7, None])
def test_name_and_rename_refuse_invalid_names(place, name):
    with new_store(place) as store:
        commit(store, count(4))
        with pytest.raises(ConfigurationError, match="name="):
            store.name(name, ROOT, count(4))
        store.name("good", ROOT, count(4))
        with pytest.raises(ConfigurationError, match="name="):
            store.rename("good", name)


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "CON", "ü 日本 🙂", "a/b\\c", ".", "x" * 200])
def test_any_printable_name_works_and_writes_only_inside_the_store(tmp_path, name):
    with PrefixStore(tmp_path / "store", block_size=4) as store:
        commit(store, count(4))
        store.name(name, ROOT, count(4))
    with PrefixStore(tmp_path / "store", block_size=4) as store:
        assert store.named(name).name == name
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_missing_prefixes_cannot_be_named_and_unknown_names_raise(place):
    with new_store(place) as store:
        commit(store, count(10))
        for tokens in (count(11), count(14), count(4, first=50)):
            with pytest.raises(StoreError, match="does not have all"):
                store.name("chat", ROOT, tokens)
        with pytest.raises(StoreError, match="does not have all"):
            store.name("chat", OTHER_ROOT, count(10))
        for call in (store.named, store.pin, store.unpin, store.unname, store.forget, store.tokens_of):
            with pytest.raises(UnknownNameError, match="nothing is called 'chat'"):
                call("chat")
        with pytest.raises(UnknownNameError):
            store.rename("chat", "other")


def test_rename_keeps_pin_and_expiry_and_unname_keeps_the_blocks(place):
    with new_store(place) as store:
        commit(store, count(4))
        store.flush()
        store.name("one", ROOT, count(4), pin=True, ttl=50)
        store.name("two", ROOT, count(4))
        with pytest.raises(ConfigurationError, match="name of something else"):
            store.rename("one", "two")
        before = store.named("one")
        store.rename("one", "three")
        after = store.named("three")
        assert (after.pinned, after.expires_at, after.created_at) == (True, before.expires_at, before.created_at)
        assert [named.name for named in store.names()] == ["three", "two"]
        store.unname("three")
        assert [named.name for named in store.names()] == ["two"]
        assert restored_length(store, count(4)) == 4


def test_pinned_prefix_is_never_evicted_from_disk(tmp_path):
    settings = {"block_size": 4, "disk_budget": 6 * UNIT, "host_budget": 1}
    with PrefixStore(tmp_path, **settings) as store:
        commit(store, count(10))
        store.name("mine", ROOT, count(10), pin=True)
        for first in range(100, 1000, 50):
            commit(store, count(12, first=first))
            assert restored_length(store, count(10)) == 10
        assert store.stats().tiers[1].pinned_blocks == 3
        store.unpin("mine")
        for first in range(1000, 2000, 50):
            commit(store, count(12, first=first))
        assert restored_length(store, count(10)) == 0
        named = store.named("mine")
        assert (named.tokens, named.kept_tokens, named.nbytes) == (10, 0, 0)
    with PrefixStore(tmp_path, **settings) as store:
        assert store.named("mine").kept_tokens == 0
        commit(store, count(10))
        assert store.named("mine").kept_tokens == 10, "the name was kept, and means the same chain"


def test_pinned_prefix_is_never_evicted_from_ram():
    with PrefixStore(block_size=4, host_budget=6 * 512) as store:
        commit(store, count(10))
        store.name("mine", ROOT, count(10), pin=True)
        for first in range(100, 1000, 50):
            commit(store, count(12, first=first))
            assert restored_length(store, count(10)) == 10
        store.unpin("mine")
        for first in range(1000, 2000, 50):
            commit(store, count(12, first=first))
        assert restored_length(store, count(10)) == 0


def test_name_with_a_ttl_expires_unless_it_is_used(place):
    clock = Clock()
    with new_store(place, clock=clock) as store:
        commit(store, count(10))
        commit(store, count(8, first=50))
        store.name("short", ROOT, count(10), ttl=100, pin=True)
        assert store.named("short").expires_at == clock.now + 100
        clock.now += 90
        commit(store, count(10))  # uses the name
        store.flush()
        clock.now += 90
        assert store.match(ROOT, count(10)).length == 10
        clock.now += 11
        store.flush()
        before = len(store.chains())
        assert store.match(ROOT, count(10)).length == 0
        assert len(store.chains()) == before - 1
        assert store.names() == ()
        assert restored_length(store, count(8, first=50)) == 8
        if store.path is not None:
            assert len(block_files(store.path)) == 2


def test_store_ttl_expires_all_blocks_except_pinned_ones(place):
    clock = Clock()
    with new_store(place, clock=clock, ttl=100) as store:
        commit(store, count(10))
        commit(store, count(8, first=50))
        store.name("kept", ROOT, count(10), pin=True)
        store.flush()
        clock.now += 101
        assert restored_length(store, count(8, first=50)) == 0
        assert restored_length(store, count(10)) == 10
        assert store.prune().blocks == 2
        assert len(store.chains()) == 1
        commit(store, count(8, first=50))
        assert restored_length(store, count(8, first=50)) == 8


def test_ttl_and_unused_for_may_be_durations(place):
    clock = Clock()
    with new_store(place, clock=clock, ttl="2d") as store:
        commit(store, count(10))
        store.flush()
        named = store.name("short", ROOT, count(10), ttl="12h")
        assert named.expires_at == named.used_at + 12 * 3600
        clock.now += 7199
        assert store.prune(unused_for="2h").blocks == 0
        clock.now += 2
        assert store.prune(unused_for="2h").blocks > 0


@pytest.mark.parametrize("ttl", [0, -1, "1 day", True, float("inf"), float("nan")])
def test_invalid_ttl_is_refused(ttl):
    with pytest.raises(ConfigurationError, match="ttl="):
        PrefixStore(ttl=ttl)


def test_forgetting_a_name_keeps_blocks_that_other_chains_share(place):
    with new_store(place) as store:
        commit(store, count(12))
        commit(store, ids(0, 1, 2, 3, 9, 9, 9, 9, 8))
        store.name("mine", ROOT, count(12), pin=True)
        forgotten = store.forget("mine")
        assert forgotten.blocks == 2
        assert forgotten.nbytes > 0
        assert restored_length(store, count(12)) == 4
        assert restored_length(store, ids(0, 1, 2, 3, 9, 9, 9, 9, 8)) == 9
        assert store.names() == ()
        assert store.verify().ok


def test_forgetting_a_name_keeps_blocks_under_another_name(place):
    with new_store(place) as store:
        commit(store, count(12))
        store.name("all", ROOT, count(12))
        store.name("begin", ROOT, count(8))
        assert store.forget("begin").blocks == 0
        store.name("begin", ROOT, count(8))
        assert store.forget("all").blocks == 1
        assert restored_length(store, count(12)) == 8


def test_forgetting_token_ids_removes_longer_chains_and_unshared_beginnings(place):
    with new_store(place) as store:
        commit(store, count(8))
        commit(store, ids(0, 1, 2, 3, 9, 9, 9, 9, 8))
        commit(store, ids(0, 1, 2, 3, 9, 9, 9, 9, 7))
        commit(store, ids(0, 1, 2, 3, 9, 9, 5))
        commit(store, count(8), OTHER_ROOT)
        store.name("pinned", ROOT, ids(0, 1, 2, 3, 9, 9, 9, 9, 8), pin=True)
        assert store.forget(ids(0, 1, 2, 3, 9, 9)).blocks == 4
        assert restored_length(store, count(8)) == 8
        assert store.match(ROOT, ids(0, 1, 2, 3, 9)).length == 4
        assert store.names() == ()
        # The last token of an answer is never cached, so ids that extend beyond the stored chain match it as well.
        assert store.forget([*range(8), 77]).blocks == 4
        assert store.chains() == ()


@pytest.mark.parametrize("what", [[], [[1, 2]], [1.5], {"a": 1}, 7, ["a"], [[1], [2, 3]]])
def test_forget_refuses_invalid_token_ids(what):
    with PrefixStore(block_size=4) as store, pytest.raises(ConfigurationError, match="token ids"):
        store.forget(what)


def test_forgotten_token_ids_are_gone_from_the_store_files(tmp_path):
    secret = count(12, first=7_777_777)
    with PrefixStore(tmp_path, block_size=4) as store:
        commit(store, secret)
        commit(store, count(8))
        store.flush()
        store.forget(secret)
        needle = secret[:4].astype("<i8").tobytes()
        for path in tmp_path.rglob("*"):
            if path.is_file() and path.suffix != ".sqlite-shm":
                assert needle not in path.read_bytes(), path


def test_names_and_pins_survive_the_loss_of_the_catalog(tmp_path):
    with PrefixStore(tmp_path, block_size=4) as store:
        commit(store, count(10))
        store.name("mine", ROOT, count(10), pin=True, ttl=1e6)
        before = store.named("mine")
    for path in tmp_path.glob("catalog.sqlite*"):
        path.unlink()
    with PrefixStore(tmp_path, block_size=4) as store:
        after = store.named("mine")
        assert (after.tokens, after.kept_tokens, after.pinned) == (10, 10, True)
        assert after.created_at == before.created_at
        assert restored_length(store, count(10)) == 10


def test_damaged_name_file_loses_only_that_name_and_verify_repairs_it(tmp_path, caplog):
    with PrefixStore(tmp_path, block_size=4) as store:
        commit(store, count(10))
        store.name("one", ROOT, count(10))
        store.name("two", ROOT, count(8))
    (path,) = [p for p in (tmp_path / "names").iterdir() if json.loads(p.read_text())["name"] == "one"]
    good = path.read_text()
    for text in (
        "",
        "[]",
        "{}",
        "[" * 9000,
        good.replace('"pinned": false', '"pinned": 7'),
        good.replace("a1a1", "../."),
    ):
        path.write_text(text)
        with PrefixStore(tmp_path, block_size=4) as store:
            assert [named.name for named in store.names()] in (["two"], ["one", "two"])
            assert restored_length(store, count(10)) == 10
            report = store.verify()
            assert [problem.kind for problem in report.problems] == ["name"]
    with PrefixStore(tmp_path, block_size=4) as store:
        assert store.verify(repair=True).ok
        assert store.verify().problems == ()
        assert not path.exists()
    assert caplog.records


def test_stores_on_one_folder_see_each_others_names(tmp_path):
    with PrefixStore(tmp_path, block_size=4) as one, PrefixStore(tmp_path, block_size=4) as two:
        commit(one, count(10))
        one.flush()
        one.name("mine", ROOT, count(10))
        assert two.named("mine").kept_tokens == 10
        two.forget("mine")
        assert one.names() == ()
        assert block_files(tmp_path) == []


def test_store_whose_folder_is_deleted_finds_nothing_and_can_reopen(tmp_path, caplog):
    with PrefixStore(tmp_path / "store", block_size=4, host_budget=1) as store:
        commit(store, count(10))
        shutil.rmtree(tmp_path / "store")
        assert restored_length_at_last(store, count(10)) == 0
        commit(store, count(10))
        with pytest.raises(StoreError):
            store.verify()
    with PrefixStore(tmp_path / "store", block_size=4) as store:
        assert commit(store, count(10)) == 10
        assert restored_length(store, count(10)) == 10


def test_chains_are_listed_named_and_forgotten_by_key(place):
    with new_store(place) as store:
        commit(store, count(10))
        commit(store, ids(0, 1, 2, 3, 9, 9))
        store.flush()
        chains = store.chains()
        assert sorted(chain.tokens for chain in chains) == [6, 10]
        longest = max(chains, key=lambda chain: chain.tokens)
        assert store.name_chain(longest.key[:12], "ten").tokens == 10
        assert store.tokens_of("ten").tolist() == count(10).tolist()
        assert [chain.names for chain in store.chains() if chain.key == longest.key] == [("ten",)]
        for prefix in ("", "zz"):
            with pytest.raises(UnknownNameError):
                store.name_chain(prefix, "other")
        other = min(chains, key=lambda chain: chain.tokens)
        assert store.forget_chain(other.key[:12]).blocks == 1
        assert restored_length(store, count(10)) == 10


def test_prune_by_age_and_size_keeps_pinned_prefixes(place):
    clock = Clock()
    with new_store(place, clock=clock) as store:
        for first in (0, 100, 200):
            commit(store, count(8, first=first))
            store.flush()
            clock.now += 10
        store.name("kept", ROOT, count(8), pin=True)
        assert store.prune(unused_for=15).blocks == 2
        assert restored_length(store, count(8)) == 8
        assert store.prune(to_bytes=0).blocks == 2
        assert restored_length(store, count(8)) == 8
        assert len(store.chains()) == 1
        with pytest.raises(ConfigurationError, match="to_bytes"):
            store.prune(to_bytes="much")


# --- with a model -----------------------------------------------------------------------------------------------------


def test_cache_name_stores_the_last_turn_under_a_name(tmp_path, make_model, generate, tokens):
    model = make_model("llama")
    with TieredCache(PrefixStore(tmp_path, block_size=8)) as cache:
        with pytest.raises(PromptError, match="cannot be named"):
            cache.name("too early")
        ids_ = tokens(20)
        found = generate(model, ids_, cache).sequences
        named = cache.name("chat", pin=True)
        assert named.tokens == found.shape[1] - 1
        with pytest.raises(PromptError, match="row 1"):
            cache.name("chat", row=1)
        cache.flush()
        kept = cache.store.tokens_of("chat")
        assert kept.tolist() == found[0, :-1].tolist()
        cache.store.close()
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store) as cache:
        prompt = torch.cat([torch.from_numpy(store.tokens_of("chat"))[None], tokens(3, seed=5)], 1)
        assert torch.equal(generate(model, prompt, cache).sequences, generate(model, prompt).sequences)
        assert cache.last_turn.cached_tokens == len(kept)


def test_manual_commit_with_name_and_ttl_names_the_turn(make_model, tokens):
    model = make_model("llama")
    with PrefixStore(block_size=8) as store, TieredCache(store) as cache:
        cache.begin(model, tokens(20))
        with torch.no_grad():
            model(tokens(20), **{CACHE: cache})
        with pytest.raises(ConfigurationError, match="name="):
            cache.commit(tokens(20), name=" ")
        cache.commit(tokens(20), name="chat", ttl=60)
        assert store.named("chat").tokens == 20
        assert store.named("chat").expires_at is not None


def test_namespaces_never_share_prefixes(tmp_path, make_model, generate, tokens):
    model, prompt = make_model("llama"), tokens(20)
    for namespace in ("a", "b", ""):
        with PrefixStore(tmp_path, block_size=8, namespace=namespace) as store, TieredCache(store) as cache:
            generate(model, prompt, cache)
            assert cache.last_turn.cached_tokens == 0
    with PrefixStore(tmp_path, block_size=8, namespace="a") as store, TieredCache(store) as cache:
        generate(model, prompt, cache)
        assert cache.last_turn.cached_tokens == 19


# --- archives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["raw", "zstd"])
def test_exported_prefix_can_be_imported_into_another_store(tmp_path, place, compression):
    with new_store(place, compression=compression) as store:
        commit(store, count(14))
        store.name("chat", ROOT, count(10), pin=True)
        nbytes = store.export("chat", tmp_path / "chat.safetensors")
        assert (tmp_path / "chat.safetensors").stat().st_size == nbytes
        with pytest.raises(ArchiveError, match="exists already"):
            store.export("chat", tmp_path / "chat.safetensors")
        assert store.export("chat", tmp_path / "chat.safetensors", overwrite=True) == nbytes
    for elsewhere in ({}, {"path": tmp_path / "elsewhere"}):
        with PrefixStore(**elsewhere, block_size=8) as store:  # imported blocks keep their size
            found = store.import_(tmp_path / "chat.safetensors")
            assert (found.name, found.tokens, found.kept_tokens, found.pinned) == ("chat", 10, 10, False)
            assert store.import_(tmp_path / "chat.safetensors", name="again").tokens == 10
            store.pin("chat")
            assert store.import_(tmp_path / "chat.safetensors").pinned
        with PrefixStore(**elsewhere, block_size=4) as store:
            if not elsewhere:
                store.import_(tmp_path / "chat.safetensors")
            assert restored_length(store, count(14)) == 10


def test_import_keeps_existing_data_and_refuses_damaged_or_oversized_archives(tmp_path):
    archive = tmp_path / "chat.safetensors"
    with PrefixStore(tmp_path / "one", block_size=4) as store:
        commit(store, count(10))
        store.name("chat", ROOT, count(10))
        store.export("chat", archive)
        (tmp_path / "one" / "roots" / f"{ROOT}.json").write_text('{"model": "mine"}')
        store.import_(archive)
        assert json.loads((tmp_path / "one" / "roots" / f"{ROOT}.json").read_text()) == {"model": "mine"}
        commit(store, count(8, first=50))
        store.name("other", ROOT, count(8, first=50))
        with pytest.raises(ConfigurationError, match="name of something else"):
            store.import_(archive, name="other")
    good = archive.read_bytes()
    for at in (3, 100, len(good) - 5):
        archive.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with PrefixStore(tmp_path / "two", block_size=4) as store:
            with pytest.raises(ArchiveError, match=str(archive)):
                store.import_(archive)
            assert store.chains() == ()
    with PrefixStore(tmp_path / "three", block_size=4, disk_budget=UNIT, host_budget=1) as store:
        archive.write_bytes(good)
        with pytest.raises(StoreError, match="no room"):
            store.import_(archive)


def test_export_refuses_incomplete_or_unknown_prefixes(tmp_path):
    with PrefixStore(tmp_path / "store", block_size=4, host_budget=1) as store:
        commit(store, count(10))
        store.name("chat", ROOT, count(10))
        store.prune(to_bytes=2 * UNIT)
        with pytest.raises(StoreError, match="not have all of it"):
            store.export("chat", tmp_path / "chat.safetensors")
        with pytest.raises(UnknownNameError):
            store.export("other", tmp_path / "chat.safetensors")
    assert not (tmp_path / "chat.safetensors").exists()


def test_prune_counts_the_blocks_of_expired_names(place):
    clock = Clock()
    with new_store(place, clock=clock) as store:
        commit(store, count(10))
        store.flush()
        store.name("short", ROOT, count(10), ttl=10)
        clock.now += 11
        assert store.prune().blocks == 3
        assert store.chains() == ()


# --- statistics -------------------------------------------------------------------------------------------------------


def test_store_stats_count_lookups_hits_misses_and_leases(place):
    with new_store(place) as store:
        assert store.stats().hit_tokens == 0
        commit(store, count(10))
        store.flush()
        for tokens, reason in (
            (count(10), None),
            (count(12), "shorter"),
            (ids(0, 1, 2, 9), "diverged"),
            (ids(5), "unknown"),
        ):
            before = store.stats().misses.get(reason, 0)
            store.match(ROOT, tokens)
            assert reason is None or store.stats().misses[reason] == before + 1
        restored_length(store, count(10))
        stats = store.stats()
        assert (stats.lookups, stats.lookup_tokens, stats.hit_tokens) == (5, 10 + 12 + 4 + 1 + 10, 10 + 10 + 3 + 0 + 10)
        assert (stats.committed_tokens, stats.queued_writes, stats.names, stats.paused) == (10, 0, 0, None)
        tiers = {tier.tier: tier for tier in stats.tiers}
        assert tiers["host"].hits == 3
        assert tiers["host"].blocks == 3
        match = store.match(ROOT, count(10))
        restore = store.restore([match.spans])
        assert {tier.tier: tier for tier in store.stats().tiers}["host"].leased_blocks == 3
        restore.close()
        assert all(tier.leased_blocks == 0 for tier in store.stats().tiers)
    with pytest.raises(ClosedError):
        store.stats()


def test_forget_accepts_text_with_an_encode_function(place):
    with new_store(place) as store:
        commit(store, ids(*b"a secret"))
        commit(store, count(8))
        assert store.forget("a secret", encode=lambda text: list(text.encode())).blocks == 2
        assert restored_length(store, count(8)) == 8
        assert len(store.chains()) == 1


def test_listing_names_takes_a_constant_number_of_queries(tmp_path):
    faults = Faults()
    asked = []
    with PrefixStore(tmp_path, block_size=4, host_budget=1, connect=faults.connect) as store:
        for first in range(100, 109):
            tokens = np.concatenate([count(8), count(6, first=first)])
            commit(store, tokens)
            store.name(str(first), ROOT, tokens)
            faults.plan()
            names = store.names()
            asked.append(sum(text.startswith("SELECT") for _, text in faults.met))
    assert len(names) == 9
    assert all(0 < name.own_bytes < name.nbytes for name in names)
    assert asked[-1] == asked[1]


def test_pinned_chain_in_ram_stays_when_its_tail_becomes_longer():
    with PrefixStore(block_size=4) as store:
        commit(store, count(6))
        store.name("chat", ROOT, count(6), pin=True)
        commit(store, count(7))
        store.prune(to_bytes=0)
        assert store.named("chat").kept_tokens == 6
