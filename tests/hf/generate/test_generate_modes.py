"""Every mode of generate() gives the tokens of a fresh ``DynamicCache``, also on a filled cache."""

from __future__ import annotations

import copy
import inspect
import threading

import numpy as np
import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.generation.streamers import BaseStreamer

import kvtier
from kvtier import BusyError, PrefixStore, PromptError, TieredCache, UninstalledError
from kvtier.hf.inputs.request import DROPPED
from tests.support.reuse import reuse_off
from tests.support.upstream import CACHE


@pytest.fixture
def turn(model, generate):
    """``turn(cache, ids, **settings)``: run it on the cache and on a fresh ``DynamicCache``, and compare."""

    def run(cache, ids, **settings):
        torch.manual_seed(7)
        expected = generate(model, ids, **settings).sequences
        torch.manual_seed(7)
        found = generate(model, ids, cache, **settings)
        assert torch.equal(found.sequences, expected)
        return found

    return run


@pytest.fixture
def used(model, generate, tokens, cache):
    """A cache that holds a turn of 30 + 8 tokens, and a prompt that continues it by 6."""
    sequences = generate(model, tokens(30), cache).sequences
    return cache, torch.cat([sequences, tokens(6, seed=1)], 1)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 50, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "beam-sampling": {"num_beams": 3, "do_sample": True},
    "many-beams-returned": {"num_beams": 4, "num_return_sequences": 3},
    "many-samples": {"do_sample": True, "num_return_sequences": 3},
    "prefill-chunks": {"prefill_chunk_size": 4},
    "one-token": {"max_new_tokens": 1},
    "repetition-penalty": {"repetition_penalty": 1.3},
    "end-of-sequence": {"eos_token_id": list(range(1, 60))},
}


def reused(mode):
    """Return how many tokens of the prompt in ``used`` a turn in ``mode`` reuses."""
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 21)
    return 0 if mode == "prefill-chunks" and old else 37


@pytest.mark.parametrize("mode", MODES)
def test_mode_matches_dynamic_cache_on_a_used_cache_and_in_the_next_turn(turn, used, tokens, store, mode):
    cache, ids = used
    found = turn(cache, ids, **MODES[mode])
    assert cache.last_turn.cached_tokens == reused(mode)
    ids = torch.cat([found.sequences[:1], tokens(3, seed=2)], 1)
    turn(cache, ids)
    assert cache.last_turn.cached_tokens >= 43  # at least that turn's prompt without its last token
    with TieredCache(store) as restored:
        turn(restored, ids)
        assert restored.last_turn.cached_tokens >= 43


@pytest.mark.parametrize("mode", MODES)
def test_mode_matches_dynamic_cache_on_a_restored_prefix(turn, used, store, mode):
    _, ids = used
    with TieredCache(store) as cache:
        turn(cache, ids, **MODES[mode])
        assert cache.last_turn.cached_by_tier["host"] == reused(mode)


@pytest.mark.parametrize("mode", MODES)
def test_mode_matches_dynamic_cache_on_an_empty_cache(turn, cache, tokens, mode):
    found = turn(cache, tokens(20), **MODES[mode])
    assert cache.last_turn.cached_tokens == 0
    turn(cache, torch.cat([found.sequences[-1:], tokens(4, seed=3)], 1))
    assert cache.last_turn.cached_tokens >= 19


def asking_for_no_cache(model, way):
    """Return settings of a call that asks for no cache."""
    if way == "call":
        return {"use_cache": False}
    config = copy.deepcopy(model.generation_config)
    config.update(use_cache=False, max_new_tokens=8, do_sample=False, suppress_tokens=[0])
    return {"generation_config": config}


@pytest.mark.parametrize("way", ["call", "config"])
def test_call_with_use_cache_false_computes_all_tokens_in_every_step(model, used, tokens, store, way):
    """The answer is that of a forward pass over all tokens at every step. The next turn starts from the store."""
    cache, ids = used
    calls, forward = [], model.forward
    model.forward = lambda *args, **kwargs: (calls.append(kwargs), forward(*args, **kwargs))[1]
    model.forward.__signature__ = inspect.signature(forward)
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [0]} if way == "call" else {}
    asked = asking_for_no_cache(model, way)
    found = model.generate(ids, past_key_values=cache, **settings, **asked)
    del model.forward
    assert [call["input_ids"].shape[1] for call in calls] == list(range(ids.shape[1], ids.shape[1] + 8))
    assert torch.equal(found, model.generate(ids, max_new_tokens=8, do_sample=False, suppress_tokens=[0]))
    assert cache.last_turn.miss_reason == "use_cache=False was passed"
    assert cache.get_seq_length() == 0
    model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert cache.last_turn.cached_by_tier["host"] == 37


@pytest.mark.parametrize("way", ["call", "config"])
def test_model_with_use_cache_false_by_default_uses_a_given_cache(model, used, way):
    """MPT has this default. Only ``use_cache=False`` in the call itself turns the cache off."""
    cache, ids = used
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [0]}
    expected = model.generate(ids, **settings)
    model.generation_config.use_cache = False
    asked = {} if way == "call" else asking_for_no_cache(model, way)
    assert torch.equal(
        model.generate(ids, past_key_values=cache, **(settings if way == "call" else {}), **asked), expected
    )
    assert cache.last_turn.cached_tokens == 37


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # asked for by peft
def test_x_lora_is_answered_without_a_cache(make_model, tokens, cache, tmp_path):
    """X-LoRA computes every forward pass twice, and asks generate() for no cache."""
    peft = pytest.importorskip("peft")
    where = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    for number in range(2):
        peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=4, **where)).save_pretrained(tmp_path / str(number))
    base = make_model("llama")
    base.config.use_cache = False
    experts = {str(number): str(tmp_path / str(number)) for number in range(2)}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, xlora_depth=2, adapters=experts)
    model, ids = peft.get_peft_model(base, config).eval(), tokens(14)
    expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    for _ in range(2):
        found = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert torch.equal(found, expected)
        assert cache.last_turn.miss_reason == "use_cache=False was passed"


@pytest.mark.parametrize("tier", ["device", "host"])
def test_rows_of_a_padded_batch_reuse_different_chains(turn, cache, tokens, store, tier):
    turn(cache, tokens(40, seed=1))
    turn(cache, tokens(25, seed=2))
    batch = torch.zeros(3, 43, dtype=torch.long)
    batch[0] = torch.cat([tokens(40, seed=1), tokens(3, seed=5)], 1)
    batch[1, 13:] = torch.cat([tokens(25, seed=2), tokens(5, seed=6)], 1)
    batch[2, 40:] = tokens(3, seed=7)  # no stored prefix; padding in all columns where the others are cached
    with TieredCache(store) as restored:
        target = cache if tier == "device" else restored
        turn(target, batch)
        assert [row.cached_tokens for row in target.last_turn.rows] == [38, 25, 0]
        assert [row.prompt_tokens for row in target.last_turn.rows] == [43, 30, 3]
        assert target.last_turn.cached_by_tier[tier] == (25 if tier == "device" else 63)


def test_batch_size_may_change_from_turn_to_turn(turn, cache, tokens):
    one, three = tokens(20, seed=1), tokens(24, rows=3, seed=2)
    three[1, :9] = 0
    for ids in (one, three, three[1:2, 9:], torch.cat([three[2:], three[:1]]), one, three):
        turn(cache, ids)
    assert cache.last_turn.cached_tokens == 23 + 14 + 23


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples_reuse_each_row_of_a_padded_batch(turn, cache, tokens, store, settings):
    ids = tokens(24, rows=2)
    ids[1, :10] = 0
    turn(cache, ids[:, :22])
    turn(cache, ids, **settings)
    assert [row.cached_tokens for row in cache.last_turn.rows] == [22, 12]
    with TieredCache(store) as restored:
        turn(restored, ids, **settings)
        assert [row.cached_tokens for row in restored.last_turn.rows] == [23, 13]


def test_generate_returns_a_plain_tensor_by_default(model, used):
    cache, ids = used
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(inputs=ids, past_key_values=cache, max_new_tokens=5, do_sample=False), expected)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False), expected)
    assert cache.last_turn.cached_tokens == ids.shape[1] - 1
    assert cache.last_turn.generated_tokens == 5


MASKS = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.sample(6)  # of 42
@pytest.mark.parametrize("dtype", MASKS, ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"prefill_chunk_size": 4}], ids=str)
def test_masks_and_ids_of_any_dtype_reuse_each_row(model, turn, cache, tokens, dtype, ids_dtype, settings):
    ids = tokens(24, rows=2).to(ids_dtype)
    ids[1, :10] = 0
    mask = (ids != 0).to(dtype)
    turn(cache, ids[:, :20], attention_mask=mask[:, :20])
    found = turn(cache, ids, attention_mask=mask, **settings)
    assert found.sequences.dtype == turn(cache, ids, attention_mask=mask).sequences.dtype
    assert [row.cached_tokens for row in cache.last_turn.rows] == [23, 13]


def test_mask_values_besides_0_and_1_turn_reuse_off(turn, cache, tokens):
    ids = tokens(20)
    turn(cache, ids, attention_mask=torch.full_like(ids, 2))
    assert "besides 0 and 1" in cache.last_turn.miss_reason
    turn(cache, ids, attention_mask=torch.ones_like(ids))
    assert cache.last_turn.cached_tokens == 0
    turn(cache, ids, attention_mask=torch.full_like(ids, 2))
    assert cache.last_turn.cached_tokens == 0


@pytest.mark.parametrize(
    "as_type",
    [
        int,
        np.int64,
        torch.tensor,
        lambda n: torch.tensor([n], dtype=torch.int32),
        lambda n: torch.tensor(n, dtype=torch.uint8),
    ],
    ids=["int", "numpy", "tensor", "int32-row", "uint8"],
)
def test_pad_and_eos_ids_of_any_type_give_the_same_answer(model, cache, tokens, as_type):
    """The padding id is masked, and tokens after an end of sequence are not kept, whatever the type of the ids."""
    ids = tokens(12, rows=2)
    ids[1, :4] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": as_type(0), "eos_token_id": as_type(5)}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)
    assert [row.prompt_tokens for row in cache.last_turn.rows] == [12, 8]


@pytest.mark.parametrize("name", sorted(DROPPED | {"num_items_in_batch"}))
def test_arguments_without_effect_on_k_and_v_leave_reuse_on(model, used, turn, name):
    """Trainers pass labels to generate()."""
    cache, ids = used
    if name == "next_sequence_length":
        pytest.skip("generate() refuses it, since it passes its own")
    turn(cache, ids, **{name: ids})
    assert cache.last_turn.cached_tokens == 37


def test_generate_output_carries_the_given_cache(model, used, generate):
    cache, ids = used
    assert generate(model, ids, cache).past_key_values is cache


class Notes(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], 0

    def put(self, value):
        self.seen.extend(value.flatten().tolist())

    def end(self):
        self.ended += 1


def test_streamer_sees_the_prompt_once_and_every_token(model, used, generate):
    cache, ids = used
    notes = Notes()
    found = generate(model, ids, cache, streamer=notes)
    assert notes.seen == found.sequences[0].tolist()
    assert notes.ended == 1


class Elsewhere(BaseStreamer):
    """Calls ``action`` on another thread when the first new token comes."""

    def __init__(self, action):
        self.action, self.puts, self.outcome = action, 0, None

    def run(self):
        try:
            self.outcome = self.action()
        except Exception as error:
            self.outcome = error

    def put(self, value):
        self.puts += 1
        if self.puts == 2:
            thread = threading.Thread(target=self.run)
            thread.start()
            thread.join(timeout=60)

    def end(self):
        pass


def test_second_thread_on_a_busy_cache_raises_busy_error(model, used, generate, turn):
    cache, ids = used
    elsewhere = Elsewhere(lambda: generate(model, ids, cache))
    expected = generate(model, ids).sequences
    assert torch.equal(generate(model, ids, cache, streamer=elsewhere).sequences, expected)
    assert isinstance(elsewhere.outcome, BusyError)
    turn(cache, ids)
    assert cache.last_turn.cached_tokens == ids.shape[1] - 1


def test_caches_on_two_threads_share_a_store(model, used, store, generate):
    cache, ids = used
    expected = generate(model, ids).sequences
    with TieredCache(store) as other:
        elsewhere = Elsewhere(lambda: generate(model, ids, other).sequences)
        assert torch.equal(generate(model, ids, cache, streamer=elsewhere).sequences, expected)
        assert torch.equal(elsewhere.outcome, expected)
        assert other.last_turn.cached_by_tier["host"] == 37


# --- changes to a cache between turns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [1, 10, 37, 100])
def test_crop_between_turns_leaves_the_stored_prefix(turn, used, tokens, removed):
    cache, ids = used
    cache.crop(-removed)
    assert cache.get_seq_length() == max(0, 37 - removed)
    turn(cache, ids)
    assert cache.last_turn.cached_by_tier["device"] == max(0, 37 - removed)
    assert cache.last_turn.cached_tokens == 37  # the rest comes from the store


@pytest.mark.parametrize(
    "move",
    [
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        lambda cache: cache.batch_repeat_interleave(2),
    ],
    ids=["reorder", "select", "select-mask", "repeat"],
)
def test_moving_rows_between_turns_matches_dynamic_cache(model, turn, cache, tokens, move):
    ids = tokens(20, rows=3)
    turn(cache, ids)
    reference = DynamicCache(config=model.config)
    model.generate(ids, **{CACHE: reference}, max_new_tokens=8, do_sample=False, suppress_tokens=[0])
    move(cache)
    move(reference)
    for ours, theirs in zip(cache.layers, reference.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length()
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
    turn(cache, ids)
    turn(cache, ids.flip(0))


def test_reset_keeps_the_store(turn, used):
    cache, ids = used
    cache.reset()
    assert cache.get_seq_length() == 0
    turn(cache, ids)
    assert cache.last_turn.cached_by_tier["host"] == 37


def test_deepcopied_cache_continues_independently(turn, used, tokens):
    cache, ids = used
    twin = copy.deepcopy(cache)
    assert twin.store is cache.store
    assert twin.get_seq_length() == cache.get_seq_length() == 37
    turn(twin, ids)
    assert twin.last_turn.cached_by_tier["device"] == 37
    kept = [layer.keys.clone() for layer in cache.layers]
    turn(twin, torch.cat([ids[:, :20], tokens(9, seed=9)], 1))  # overwrites tokens of the twin
    for layer, before in zip(cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, before)
    turn(cache, ids)
    assert cache.last_turn.cached_by_tier["device"] == 37


def test_closing_a_deepcopy_leaves_the_original_usable(turn, used):
    cache, ids = used
    twin = copy.deepcopy(cache)
    twin.close()
    turn(cache, ids)
    assert cache.last_turn.cached_by_tier["device"] == 37


# --- other ways to generate -------------------------------------------------------------------------------------------


def test_prompt_lookup_starts_cold_and_its_tokens_are_kept(model, turn, used, generate):
    cache, ids = used
    ids = torch.cat([ids, ids[:, :12]], 1)  # something to look up
    turn(cache, ids, prompt_lookup_num_tokens=3)
    assert cache.last_turn.cached_tokens == 0
    assert cache.last_turn.miss_reason == "assisted decoding starts cold"
    turn(cache, ids)
    assert cache.last_turn.cached_tokens == ids.shape[1] - 1


def test_assistant_model_gives_the_answer_of_a_fresh_cache(model, make_model, used, generate):
    cache, ids = used
    assistant = make_model("llama", num_hidden_layers=1)
    expected = generate(model, ids).sequences
    assert torch.equal(generate(model, ids, cache, assistant_model=assistant).sequences, expected)
    assert torch.equal(generate(model, ids, cache).sequences, expected)


@reuse_off
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_encoder_decoder_model_is_answered_without_reuse(tokens, cache, settings):
    config = transformers.T5Config(
        vocab_size=200, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.shared.weight, std=0.5)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **settings}
    both = EncoderDecoderCache(cache, DynamicCache())
    for seed in (0, 1, 0):
        ids = tokens(12, rows=2, seed=seed)
        expected = model.generate(ids, **settings)
        assert torch.equal(model.generate(ids, past_key_values=both, **settings), expected)
        assert cache.last_turn.cached_tokens == 0
        assert (
            cache.last_turn.miss_reason
            == "encoder-decoder models are not reused: K and V depend on the encoder's input too"
        )


# --- loops that call the model themselves -----------------------------------------------------------------------------


def loop(model, cache, ids, steps=6):
    """Greedy decoding by hand."""
    report = cache.begin(model, ids)
    known = cache.get_seq_length()
    assert report.cached_tokens == known
    sequences, feed = ids, ids[:, known:]
    with torch.no_grad():
        for _ in range(steps):
            logits = model(feed, **{CACHE: cache}).logits[:, -1]
            feed = logits.argmax(-1, keepdim=True)
            sequences = torch.cat([sequences, feed], 1)
    return sequences, cache.commit(sequences)


def test_custom_loop_reuses_its_turns_and_matches_generate(model, cache, tokens, store):
    ids = tokens(20)
    for turn, known in enumerate((0, 25)):
        found, report = loop(model, cache, ids)
        assert torch.equal(found, model.generate(ids, max_new_tokens=6, do_sample=False))
        assert (report.cached_tokens, report.generated_tokens) == (known, 6)
        ids = torch.cat([found, tokens(4, seed=turn + 1)], 1)
    with TieredCache(store) as restored:
        found, report = loop(model, restored, ids)
        assert torch.equal(found, model.generate(ids, max_new_tokens=6, do_sample=False))
        assert report.cached_by_tier["host"] == 35


def test_commit_requires_begin_and_the_same_prompt(model, cache, tokens):
    with pytest.raises(PromptError, match="without begin"):
        cache.commit(tokens(5))
    cache.begin(model, tokens(20))
    with torch.no_grad():
        model(tokens(20), **{CACHE: cache})
    with pytest.raises(PromptError, match="do not begin with the prompt"):
        cache.commit(tokens(20, seed=1))
    assert cache.commit(tokens(20)).computed_tokens == 20


def test_buffers_changed_by_a_bare_forward_pass_are_not_reused(model, cache, turn, tokens):
    """A bare forward pass appends K and V. The next turn must not take them for K and V of its prompt."""
    turn(cache, tokens(20))
    with torch.no_grad():
        model(tokens(5, seed=9), **{CACHE: cache})
    turn(cache, torch.cat([tokens(20), tokens(8, seed=1)], 1))
    assert cache.last_turn.cached_by_tier["device"] == 0


def test_mask_of_another_width_raises_prompt_error(model, cache, tokens):
    with pytest.raises(PromptError, match="whole conversation"):
        model.generate(tokens(5), attention_mask=torch.ones(1, 9, dtype=torch.long), past_key_values=cache)


def test_holes_in_the_mask_turn_reuse_off(turn, used):
    cache, ids = used
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    turn(cache, ids, attention_mask=mask)
    assert cache.last_turn.cached_tokens == 0
    assert "holes" in cache.last_turn.miss_reason
    turn(cache, ids)


@pytest.mark.parametrize("length", [20, 40])
def test_generate_on_a_used_cache_raises_uninstalled_error_after_uninstall(model, cache, tokens, length):
    settings = {"max_new_tokens": 8, "do_sample": False}
    model.generate(tokens(30), past_key_values=cache, **settings)
    try:
        kvtier.uninstall()
        with pytest.raises(UninstalledError, match="make a new TieredCache"):
            model.generate(tokens(length, seed=3), **{CACHE: cache}, **settings)
        found, _ = loop(model, cache, tokens(length, seed=3))
        assert torch.equal(found, model.generate(tokens(length, seed=3), max_new_tokens=6, do_sample=False))
    finally:
        with PrefixStore() as store, TieredCache(store):
            pass
    expected = model.generate(tokens(length, seed=3), **settings)
    assert torch.equal(model.generate(tokens(length, seed=3), past_key_values=cache, **settings), expected)


def test_uninstall_restores_the_original_generate(model, cache, tokens):
    wrapped = GenerationMixin.generate
    try:
        kvtier.uninstall()
        original = GenerationMixin.generate
        assert original is not wrapped
        assert wrapped.__wrapped__ is original
        kvtier.uninstall()
        assert GenerationMixin.generate is original
    finally:
        with PrefixStore() as store, TieredCache(store):
            pass
    assert GenerationMixin.generate.__wrapped__ is original
