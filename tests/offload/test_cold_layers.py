"""Contexts larger than a budget: the bits of ``DynamicCache``, byte counts within limits, and clear error messages."""

from __future__ import annotations

import copy
import gc
import os
import random
import threading

import pytest
import torch
from transformers import DynamicCache

from kvtier import BudgetError, ConfigurationError, PrefixStore, StreamError, TieredCache
from kvtier.testing import SimulatedEngine
from tests.support.interrupts import Interrupt
from tests.support.reuse import states_alone_off
from tests.support.upstream import CACHE

PAGE = 8
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def assert_same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, (mine, reference) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        assert torch.equal(mine, reference), f"step {step}: {(mine - reference).abs().max()}"


def token_bytes(model) -> int:
    """K and V of one token in all layers."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.long), **{CACHE: cache})
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)


def everything(model, columns, rows=1) -> int:
    """A budget in which all layers stay hot."""
    return rows * token_bytes(model) * (columns + columns // 8 + 3 * PAGE)


@pytest.fixture
def spill(tmp_path):
    """A folder for page files. It must be empty at the end."""
    folder = tmp_path / "spill"
    others = set(threading.enumerate())  # of stores left open by tests in other files
    yield folder
    gc.collect()
    assert not list(folder.glob("*/*")), "page files were left behind"
    left = [thread for thread in threading.enumerate() if thread not in others and thread.name.startswith("kvtier")]
    assert not left, "threads were left behind"


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)  # of 54
@dtypes
@pytest.mark.parametrize("share", [0.5, 0.65, 1.0])
def test_turns_of_a_conversation_are_exact_within_the_device_budget(
    make_model, generate, tokens, spill, family, dtype, share
):
    """First turn, continued turn and restore, with most layers, some or none cold."""
    model = make_model(family, dtype, num_hidden_layers=6, layer_types=None)
    reference, budget = DynamicCache(config=model.config), int(share * everything(model, 75))
    with PrefixStore(block_size=PAGE) as store:
        with TieredCache(store, device_budget=budget, spill_dir=spill) as cache:
            ids = tokens(40)
            first = generate(model, ids, cache)
            assert_same(first, generate(model, ids, reference))
            ids = torch.cat([first.sequences, tokens(5, seed=1)], 1)
            continued = generate(model, ids, cache)
            assert cache.last_turn.cached_by_tier["device"] == 47
            assert cache.last_turn.peak_device_bytes <= budget
            assert_same(continued, generate(model, ids, reference))
            slides = any(getattr(layer, "is_sliding", False) for layer in cache.layers)
            assert (cache.last_turn.cold_layers > 0) == (share < 1) or slides  # windows may fit where all did not
            assert share < 1 or not cache.last_turn.cold_layers
        ids = torch.cat([continued.sequences, tokens(5, seed=2)], 1)
        with TieredCache(store, device_budget=budget, spill_dir=spill) as cache:
            restored = generate(model, ids, cache)
            assert cache.last_turn.cached_tokens == 60
            assert cache.last_turn.peak_device_bytes <= budget
        assert_same(restored, generate(model, ids, reference))


def test_output_is_exact_for_every_budget_from_all_cold_to_all_hot(make_model, generate, tokens, spill):
    model, ids = make_model("llama", num_hidden_layers=8), tokens(60)
    expected, seen = generate(model, ids), set()
    full = everything(model, 68)
    for budget in range(full // 3, full + 1, full // 40):
        with TieredCache(PrefixStore(block_size=PAGE), device_budget=budget, spill_dir=spill) as cache:
            try:
                ours = generate(model, ids, cache)
            except BudgetError:
                continue
            assert_same(ours, expected)
            report = cache.last_turn
            assert report.peak_device_bytes <= budget
            assert report.hot_layers + report.cold_layers == 8
            seen.add(report.hot_layers)
            cache.store.close()
    assert seen >= {0, 1, 2, 3, 4, 8}, seen


@pytest.mark.sample(3)  # of 4
@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prefill_chunk_size": 16},
    ],
    ids=str,
)
def test_offloading_is_exact_for_beams_sampling_and_chunked_prefill(make_model, generate, tokens, spill, mode):
    model, ids = make_model("gemma3", num_hidden_layers=6, layer_types=None), tokens(50)
    rows = mode.get("num_beams") or mode.get("num_return_sequences", 1)
    budget = int(0.45 * everything(model, 58, rows))
    with PrefixStore(block_size=PAGE) as store, TieredCache(store, device_budget=budget, spill_dir=spill) as cache:
        torch.manual_seed(3)
        ours = generate(model, ids, cache, **mode)
        assert cache.last_turn.cold_layers > 0
        assert cache.last_turn.peak_device_bytes <= budget
        torch.manual_seed(3)
        assert_same(ours, generate(model, ids, **mode))
        again = torch.cat([ours.sequences[:1], tokens(3, seed=4)], 1)
        cached = generate(model, again, cache)
        assert cache.last_turn.cached_tokens >= 50
        assert torch.equal(cached.sequences, generate(model, again).sequences)


def test_padded_batch_restores_rows_from_different_chains_while_offloaded(make_model, generate, tokens, spill):
    model, long, short = make_model("llama", num_hidden_layers=6), tokens(50), tokens(33, seed=1)
    budget = int(0.5 * everything(model, 75, 2))
    with PrefixStore(block_size=PAGE) as store, TieredCache(store, device_budget=budget, spill_dir=spill) as cache:
        for ids in (long, short):
            generate(model, ids, TieredCache(store))
        batch = torch.zeros(2, 55, dtype=torch.long)
        batch[0, :50], batch[0, 50:] = long, tokens(5, seed=2)
        batch[1, 17:50], batch[1, 50:] = short, tokens(5, seed=3)
        ours = generate(model, batch, cache)
        assert cache.last_turn.cached_tokens == 50 + 33
        assert cache.last_turn.cold_layers > 0
        assert torch.equal(ours.sequences, generate(model, batch).sequences)


def test_offloading_is_exact_when_layers_share_k_and_v(spill):
    """In Gemma 3n the last layers attend to K and V of an earlier layer. By then a slot would hold another layer."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=16,
        hidden_size_per_layer_input=8,
        intermediate_size=16,
        num_hidden_layers=10,
        num_kv_shared_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 5,
        sliding_window=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 10,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = Gemma3nForCausalLM(config).eval()
    ids = torch.randint(1, 64, (1, 60))
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **{CACHE: DynamicCache(config=config)}, **settings)
    budget = int(0.6 * everything(model, 68))
    with PrefixStore(block_size=PAGE) as store, TieredCache(store, device_budget=budget, spill_dir=spill) as cache:
        ours = model.generate(ids, past_key_values=cache, **settings)
        assert cache.last_turn.cold_layers > 0
        assert_same(ours, expected)


def test_copies_of_an_offloaded_cache_are_independent(make_model, generate, tokens, spill):
    model, ids = make_model("llama", num_hidden_layers=6), tokens(60)
    budget = int(0.7 * everything(model, 90))
    store = PrefixStore(block_size=PAGE)
    cache = TieredCache(store, device_budget=budget, spill_dir=spill)
    ids = torch.cat([generate(model, ids, cache).sequences, tokens(4, seed=1)], 1)
    twin = copy.deepcopy(cache)
    other = torch.cat([ids[:, :-3], tokens(6, seed=2)], 1)
    assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)
    cache.close()
    with twin:
        ours = generate(model, other, twin)
        assert twin.last_turn.cached_by_tier["device"] >= 65
        assert torch.equal(ours.sequences, generate(model, other).sequences)
    store.close()


def cold_layers(cache) -> int:
    return sum(device_memory.cold_layers for device_memory in cache.turns.layers.offload.device_memories)


# --- promised limits in bytes -----------------------------------------------------------------------------------------


def test_step_loads_full_pages_of_cold_layers_and_writes_filled_pages(make_model, tokens, spill):
    model, prompt = make_model("llama", num_hidden_layers=8), tokens(61)
    token = token_bytes(model) // 8
    budget = int(0.5 * everything(model, 90))
    with PrefixStore(block_size=PAGE) as store, TieredCache(store, device_budget=budget, spill_dir=spill) as cache:
        cache.begin(model, prompt)
        ids, transfers = prompt, cache.turns.layers.offload.transfers
        with torch.no_grad():
            model(ids, **{CACHE: cache})
            model(tokens(1), **{CACHE: cache})  # from here on, each step finds the ring as the last step left it
            checked = 0
            for length in range(62, 82):
                before, cold = transfers.copy(), cold_layers(cache)
                model(tokens(1, seed=length), **{CACHE: cache})
                moved = transfers.since(before)
                assert moved.waits > 2
                if cold_layers(cache) != cold:
                    continue  # another layer turned cold, without a prefetch
                checked += 1
                pages = length // PAGE * PAGE
                fills = (length + 1) % PAGE == 0
                # Among the layers prefetched for the next step, pages that filled in this step are loaded already. That
                # is one layer: the last layer is cold, and attention uses the other slot.
                ahead = PAGE * token if fills else 0
                assert moved.bytes_up == cold * pages * token + ahead
                assert moved.bytes_down == (cold * PAGE * token if fills else 0)
                assert moved.waits == cold
            assert checked > 12


def test_no_bytes_move_when_everything_fits_the_budget(make_model, generate, tokens, spill):
    model, ids = make_model("llama"), tokens(60)
    with TieredCache(PrefixStore(block_size=PAGE), device_budget=everything(model, 68), spill_dir=spill) as cache:
        generate(model, ids, cache)
        report = cache.last_turn
        assert (report.bytes_down, report.bytes_up, report.waits) == (0, 0, 0)
        assert (report.hot_layers, report.cold_layers) == (3, 0)
        assert report.peak_device_bytes >= token_bytes(model) * 67
        cache.store.close()
    assert not spill.exists()


def test_cold_layers_borrow_pages_from_the_disk_store(make_model, generate, tokens, tmp_path, spill):
    """Whole blocks are read from the files of the store; their pages are not written again."""
    model, ids = make_model("llama", num_hidden_layers=8), tokens(64)
    with PrefixStore(tmp_path / "store", block_size=PAGE) as store, TieredCache(store) as cache:
        sequences = generate(model, ids, cache).sequences
    ids = torch.cat([sequences, tokens(3, seed=1)], 1)
    budget = int(0.7 * everything(model, 90))
    with PrefixStore(tmp_path / "store", block_size=PAGE) as store:
        with TieredCache(store, device_budget=budget, spill_dir=spill) as cache:
            ours = generate(model, ids, cache, max_new_tokens=2)
            report = cache.last_turn
            assert report.cached_by_tier["disk"] == 71
            assert report.cold_layers > 2
            page = PAGE * token_bytes(model) // 8
            assert report.bytes_down == report.cold_layers * page  # the one page that this turn filled
            assert report.restored_bytes < 71 * token_bytes(model)
        assert torch.equal(ours.sequences, generate(model, ids, max_new_tokens=2).sequences)


def test_pages_borrowed_from_ram_count_against_the_host_budget(make_model, generate, tokens, spill):
    """On an accelerator, a block stays in the store's RAM, but the store may evict it before the layer releases it."""
    model, ids = make_model("llama", num_hidden_layers=8), tokens(64)
    with PrefixStore(block_size=PAGE) as store:
        sequences = generate(model, ids, TieredCache(store)).sequences
        ids = torch.cat([sequences, tokens(3, seed=1)], 1)
        for host_bytes in (2**30, 12_000):
            engine = SimulatedEngine(random.Random(0))
            arguments = {"host_budget": host_bytes, "spill_dir": spill, "engine": lambda device, e=engine: e}
            budget = int(0.7 * everything(model, 90))
            with TieredCache(store, device_budget=budget, **arguments) as cache, engine.watching():
                ours = generate(model, ids, cache)
                report = cache.last_turn
                assert report.cached_by_tier["host"] >= 71
                assert 0 < report.peak_host_bytes <= host_bytes
            assert torch.equal(ours.sequences, generate(model, ids).sequences)


@states_alone_off
def test_device_budget_without_effect_on_a_model_is_logged_once(caplog):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=2)
    model, ids = MambaForCausalLM(config).eval(), torch.ones(1, 4, dtype=torch.long)
    with TieredCache(PrefixStore(block_size=PAGE), config=config, device_budget=10**6) as cache:
        for _ in range(2):
            model.generate(ids, cache_params=cache, max_new_tokens=2, do_sample=False)
        cache.store.close()
    assert caplog.text.count("device_budget has no effect") == 1


def test_auto_budget_keeps_all_layers_hot_when_memory_suffices(make_model, generate, tokens, spill):
    model, ids = make_model("llama"), tokens(40)
    with TieredCache(PrefixStore(block_size=PAGE), device_budget="auto", spill_dir=spill) as cache:
        assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)
        assert cache.last_turn.cold_layers == 0
        cache.store.close()


def test_auto_budget_turns_layers_cold_when_memory_gets_scarce(make_model, generate, tokens, spill, monkeypatch):
    model, ids = make_model("llama", num_hidden_layers=6), tokens(60)
    memory = [everything(model, 120)]

    def free(device):
        return memory[0] - sum(
            device_memory.ledger.used_bytes for device_memory in cache.turns.layers.offload.device_memories
        )

    monkeypatch.setattr("kvtier.offload.manager.free_device_bytes", free)
    with PrefixStore(block_size=PAGE) as store, TieredCache(store, device_budget="auto", spill_dir=spill) as cache:
        first = generate(model, ids, cache)
        assert cache.last_turn.cold_layers == 0
        memory[0] //= 2  # another user takes the rest
        ids = torch.cat([first.sequences, tokens(30, seed=1)], 1)
        assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)
        assert cache.last_turn.cold_layers > 0


# --- errors and their messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["device_budget", "host_budget"])
@pytest.mark.parametrize("value", ["12 parsecs", 0, -1, 1.5, True])
def test_invalid_budget_is_rejected(argument, value):
    with pytest.raises(ConfigurationError, match=argument):
        TieredCache(**{"device_budget": 10**9, argument: value})


@pytest.mark.cpu_only("beside an accelerator, pages go to RAM before files")
def test_spill_dir_that_becomes_a_file_raises_stream_error(make_model, generate, tokens, tmp_path):
    model = make_model("llama", num_hidden_layers=6)
    budget = int(0.6 * everything(model, 68))
    with (
        PrefixStore(block_size=PAGE) as store,
        TieredCache(store, device_budget=budget, spill_dir=tmp_path / "file") as cache,
    ):
        (tmp_path / "file").write_text("")
        with pytest.raises(StreamError, match="spill_dir"):
            generate(model, tokens(60), cache)


def test_budget_error_names_the_smallest_budget_that_works(make_model, generate, tokens, spill):
    model, ids = make_model("llama", num_hidden_layers=6), tokens(60)
    with TieredCache(PrefixStore(block_size=PAGE), device_budget=2000, spill_dir=spill) as cache:
        with pytest.raises(BudgetError, match=r"need (\d+) bytes") as refused:
            generate(model, ids, cache)
        cache.store.close()
    smallest = int(str(refused.value).split("need ")[1].split()[0])
    with TieredCache(PrefixStore(block_size=PAGE), device_budget=smallest, spill_dir=spill) as cache:
        assert_same(generate(model, ids, cache), generate(model, ids))  # the whole answer, with not one byte more
        assert cache.last_turn.cold_layers == 6
        short = tokens(5, seed=9)
        assert_same(generate(model, short, cache), generate(model, short))
        assert cache.last_turn.cold_layers == 0, "layers stay cold where there is room for them"
        cache.store.close()


def half_cold(model, store, spill):
    return TieredCache(store, device_budget=int(0.5 * everything(model, 90)), spill_dir=spill)


@pytest.mark.cpu_only("beside an accelerator, pages go to RAM before files")
def test_full_disk_is_reported_and_the_next_turn_works(make_model, generate, tokens, spill, monkeypatch):
    model, ids = make_model("llama", num_hidden_layers=6), tokens(60)

    def full(*_):
        raise OSError(28, "No space left on device")

    with PrefixStore(block_size=PAGE) as store, half_cold(model, store, spill) as cache:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwritev", full)
            with pytest.raises(StreamError, match=r"No space left"):
                generate(model, ids, cache)
        assert_same(generate(model, ids, cache), generate(model, ids))


@pytest.mark.cpu_only("beside an accelerator, pages go to RAM before files")
@pytest.mark.parametrize("how", ["cut", "delete", "unreadable"])
def test_page_file_lost_during_a_turn_raises_and_the_cache_works_afterwards(
    make_model, tokens, generate, spill, monkeypatch, how
):
    """Its K and V are gone. The model gets no other values in their place, and the cache works afterwards."""
    model, ids = make_model("llama", num_hidden_layers=6), tokens(60)
    with PrefixStore(block_size=PAGE) as store, half_cold(model, store, spill) as cache:
        cache.begin(model, ids)
        with torch.no_grad():
            model(ids, **{CACHE: cache})
            for path in spill.glob("*/*.safetensors"):
                if how == "cut":
                    os.truncate(path, 100)
                elif how == "delete":
                    path.unlink()
            if how == "unreadable":
                monkeypatch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            with pytest.raises(StreamError, match="lost"):
                feed(model, [tokens(1, seed=step) for step in range(4)], cache)  # prefetched pages may be intact
        monkeypatch.undo()
        assert_same_tokens(model, generate, ids, cache)


@pytest.mark.cpu_only("beside an accelerator, pages go to RAM before files")
def test_lost_page_files_of_known_tokens_are_replaced_from_the_store(make_model, generate, tokens, spill):
    """Before the first new token all tokens are known, so the turn starts again."""
    model, ids = make_model("llama", num_hidden_layers=6), tokens(60)
    with PrefixStore(block_size=PAGE) as store, half_cold(model, store, spill) as cache:
        ids = torch.cat([generate(model, ids, cache).sequences, tokens(4, seed=1)], 1)
        for path in spill.glob("*/*.safetensors"):
            path.unlink()
        for device_memory in cache.turns.layers.offload.device_memories:  # prefetched pages are intact
            device_memory.ring.close()
        ours = generate(model, ids, cache)
        assert torch.equal(ours.sequences, generate(model, ids).sequences)
        assert cache.last_turn.cached_by_tier["host"] == 67


@pytest.mark.sample(2)  # of 18
@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize("at_pass", [0, 1, 5])
def test_interrupt_in_any_layer_leaves_a_working_cache(make_model, generate, tokens, spill, layer, at_pass):
    model, ids = make_model("llama", num_hidden_layers=6), tokens(60)
    with PrefixStore(block_size=PAGE) as store, half_cold(model, store, spill) as cache:
        with Interrupt(model.model.layers[layer], at_pass, False), pytest.raises(KeyboardInterrupt):
            generate(model, ids, cache)
        assert_same_tokens(model, generate, torch.cat([ids, tokens(2, seed=1)], 1), cache)


@pytest.mark.sample(2)  # of 18
@pytest.mark.parametrize("host_bytes", [2**30, 30_000], ids=["host", "disk"])
@pytest.mark.parametrize("at", [0, 1, 2, 5, 9, 14, 30, 61, 90])
def test_interrupt_at_any_transfer_step_leaves_a_working_cache(make_model, generate, tokens, spill, host_bytes, at):
    """The interrupt comes while a copy is enqueued, a mark is taken, or a wait is in progress."""
    model, ids = make_model("llama", num_hidden_layers=6), tokens(60)

    def interrupt(step, ordinal):
        if ordinal == at and step not in ("copy", "call"):
            raise KeyboardInterrupt

    engine = SimulatedEngine(random.Random(at), fail=interrupt)
    arguments = {"host_budget": host_bytes, "spill_dir": spill, "engine": lambda device: engine}
    with (
        PrefixStore(block_size=PAGE) as store,
        TieredCache(store, device_budget=int(0.6 * everything(model, 90)), **arguments) as cache,
    ):
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, cache)
        assert_same_tokens(model, generate, torch.cat([ids, tokens(2, seed=1)], 1), cache)


def feed(model, steps, cache):
    for ids in steps:
        model(ids, **{CACHE: cache})


def assert_same_tokens(model, generate, ids, cache):
    assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)


@pytest.mark.cpu_only("beside an accelerator, pages go to RAM before files")
def test_full_disk_in_one_cache_leaves_other_caches_intact(make_model, generate, tokens, spill, monkeypatch):
    model, ids, other_ids = make_model("llama", num_hidden_layers=6), tokens(60), tokens(50, seed=1)
    with (
        PrefixStore(block_size=PAGE) as store,
        half_cold(model, store, spill) as cache,
        half_cold(model, store, spill) as other,
    ):
        sequences = generate(model, other_ids, other).sequences
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwritev", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(StreamError):
                generate(model, ids, cache)
        more = torch.cat([sequences, tokens(3, seed=2)], 1)
        assert_same_tokens(model, generate, more, other)
        assert other.last_turn.cached_by_tier["device"] == 57
