"""generate() with compiled models, in pipelines, on threads, with more outputs, and with refused settings."""

from __future__ import annotations

import threading

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AsyncTextIteratorStreamer,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

from kvtier import PrefixStore, TieredCache
from tests.support.reuse import reuse_off

pytestmark = pytest.mark.sample(2)


@pytest.fixture
def used(model, generate, tokens, cache):
    """A cache that holds a turn of 30 + 8 tokens, and a prompt that continues it by 6."""
    sequences = generate(model, tokens(30), cache).sequences
    return cache, torch.cat([sequences, tokens(6, seed=1)], 1)


@pytest.fixture
def tokenizer():
    """One word, one token: ``w7`` is 7; 0 is padding."""
    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, 200)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    split = pre_tokenizers.Split(Regex(r"w\d+"), "isolated")  # a pipeline appends new text without a space
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", padding_side="left")
    made.chat_template = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}w3"
    return made


def words(ids):
    return " ".join(f"w{i}" for i in ids.flatten().tolist())


# --- compiled ---------------------------------------------------------------------------------------------------------


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    return model


def compiled_in_place(model):
    model.compile(backend="eager", dynamic=True)
    return model


def compiled_module(model):
    return torch.compile(model, backend="eager", dynamic=True)


@pytest.mark.sample(1)  # of 3
@pytest.mark.parametrize(
    ("how", "settings"),
    [(compiled_forward, {}), (compiled_in_place, {"num_beams": 2}), (compiled_module, {})],
    ids=["forward", "in-place-beams", "module"],
)
def test_compiled_model_reuses_the_prefix(how, settings, make_model, cache, tokens):
    torch._dynamo.reset()
    shape = {"num_hidden_layers": 1}
    plain, model = make_model("llama", **shape), how(make_model("llama", **shape))
    ids = tokens(20)
    call = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [0], **settings}
    for known in (0, 21):
        found = model.generate(ids, past_key_values=cache, **call)
        assert torch.equal(found, plain.generate(ids, **call))
        assert cache.last_turn.cached_tokens >= (min(known, 20) if settings else known), cache.last_turn
        ids = torch.cat([found, tokens(5, seed=1)], 1)
    torch._dynamo.reset()


def test_compile_config_does_not_change_the_answer_or_reuse(model, used, generate):
    """``generate`` compiles nothing for growing caches. It says so and continues."""
    cache, ids = used
    config = CompileConfig(backend="eager", dynamic=True)
    config._compile_all_devices = True
    expected = generate(model, ids).sequences
    assert torch.equal(generate(model, ids, cache, compile_config=config).sequences, expected)
    assert cache.last_turn.cached_tokens == 37


# --- pipelines --------------------------------------------------------------------------------------------------------


def test_pipeline_reuses_a_cache_from_call_to_call(model, tokenizer, tokens, cache):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = words(tokens(20))
    for known in (0, 27, 36):
        call = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [0]}
        found = pipe(text, past_key_values=cache, **call)[0]["generated_text"]
        assert found == pipe(text, **call)[0]["generated_text"]
        assert cache.last_turn.cached_tokens == known
        text = f"{found} w9"


def test_pipeline_with_chat_messages_reuses_a_cache(model, tokenizer, tokens, cache):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    call = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0]}
    messages = [{"role": "user", "content": words(tokens(12))}]
    for turn, known in enumerate((0, 14)):  # the template formats answers differently than the model
        found = pipe(messages, past_key_values=cache, **call)[0]["generated_text"]
        assert found == pipe(messages, **call)[0]["generated_text"]
        assert cache.last_turn.cached_tokens == known
        messages = [*found, {"role": "user", "content": words(tokens(4, seed=turn + 1))}]


def test_pipeline_with_batches_reuses_a_cache(model, tokenizer, tokens, cache):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    call = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [0]}
    texts = [words(tokens(12)), words(tokens(9, seed=1)), words(tokens(12))]
    expected = pipe(texts, **call)
    assert pipe(texts, past_key_values=cache, **call) == expected
    assert pipe(texts, past_key_values=cache, **call) == expected
    assert cache.last_turn.cached_tokens == 11


# --- streamers and threads --------------------------------------------------------------------------------------------


def test_text_streamer_gets_the_answer_of_another_thread(model, used, tokenizer, generate):
    cache, ids = used
    expected = generate(model, ids).sequences[0, ids.shape[1] :]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate,
        args=(ids,),
        kwargs={
            "past_key_values": cache,
            "streamer": streamer,
            "max_new_tokens": 8,
            "do_sample": False,
            "suppress_tokens": [0],
        },
    )
    thread.start()
    assert "".join(streamer).split() == words(expected).split()
    thread.join()
    assert cache.last_turn.cached_tokens == 37
    assert cache.last_turn.generated_tokens == 8


def test_asynchronous_streamer_gets_the_answer(model, used, tokenizer, generate):
    import asyncio

    cache, ids = used
    expected = generate(model, ids).sequences[0, ids.shape[1] :]

    async def listen():
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [0]}
        task = asyncio.to_thread(model.generate, ids, past_key_values=cache, streamer=streamer, **settings)
        waiting = asyncio.ensure_future(task)
        text = "".join([piece async for piece in streamer])
        await waiting
        return text

    assert asyncio.run(listen()).split() == words(expected).split()
    assert cache.last_turn.cached_tokens == 37


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_threads_with_separate_caches_share_a_store(model, tokens, settings):
    """The threads share the model too, and beam search watches its forward passes."""
    prompts = [torch.cat([tokens(24), tokens(5, seed=seed)], 1) for seed in range(4)]
    call = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0], **settings}
    expected = [model.generate(ids, **call) for ids in prompts]
    start, problems = threading.Barrier(len(prompts)), []
    with PrefixStore(block_size=8) as store:

        def work(which):
            try:
                with TieredCache(store) as cache:
                    start.wait()
                    for turn in range(3):
                        found = model.generate(prompts[which], past_key_values=cache, **call)
                        assert torch.equal(found, expected[which])
                        assert turn == 0 or cache.last_turn.cached_tokens == 28, cache.last_turn
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=work, args=(which,)) for which in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems, problems


# --- more outputs, and settings that change nothing -------------------------------------------------------------------


def test_attentions_and_hidden_states_cover_the_computed_tokens(model, used, generate):
    """Cached tokens have none, because they were not computed. All other tokens have them."""
    cache, ids = used
    wanted = {"output_attentions": True, "output_hidden_states": True, "output_scores": True}
    expected, found = generate(model, ids, **wanted), generate(model, ids, cache, **wanted)
    assert torch.equal(found.sequences, expected.sequences)
    assert cache.last_turn.cached_tokens == 37
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        for layer, whole in zip(ours, theirs, strict=True):
            assert torch.allclose(layer, whole[:, -layer.shape[1] :], atol=1e-4)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        for layer, whole in zip(ours, theirs, strict=True):
            assert torch.allclose(layer, whole[:, :, -layer.shape[2] :], atol=1e-4)
    assert found.hidden_states[0][0].shape[1] == ids.shape[1] - 37
    assert found.attentions[0][0].shape[-1] == ids.shape[1]


@pytest.mark.parametrize(
    "settings",
    [{"synced_gpus": False}, {"prefill_chunk_size": 3}, {"disable_compile": True}],
    ids=str,
)
def test_settings_without_effect_do_not_change_the_answer(model, used, generate, settings):
    cache, ids = used
    assert torch.equal(generate(model, ids, cache, **settings).sequences, generate(model, ids).sequences)
    assert cache.last_turn.generated_tokens == 8


def test_turn_in_inference_mode_is_reused_outside_of_it(model, used, generate, tokens):
    cache, ids = used
    with torch.inference_mode():
        found = generate(model, ids, cache).sequences
    assert torch.equal(found, generate(model, ids).sequences)
    assert cache.last_turn.cached_tokens == 37
    longer = torch.cat([found, tokens(3, seed=2)], 1)
    assert torch.equal(generate(model, longer, cache).sequences, generate(model, longer).sequences)
    assert cache.last_turn.cached_tokens == found.shape[1] - 1


# --- refused or unsupported -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["argument", "config"])
@pytest.mark.parametrize("kind", ["static", "dynamic", "quantized"])
def test_cache_implementation_beside_a_cache_raises_and_leaves_it_usable(model, used, generate, kind, where):
    cache, ids = used
    settings = {"cache_implementation": kind, "max_new_tokens": 4}
    if where == "config":
        settings = {"generation_config": GenerationConfig(pad_token_id=0, **settings)}
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, past_key_values=cache, **settings)
    assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)


@reuse_off
def test_model_with_its_own_cache_is_answered_without_reuse(make_model, tokens, cache, monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(type(model), "_supports_default_dynamic_cache", classmethod(lambda cls: False))
    ids = tokens(20)
    call = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [0]}
    for _ in range(2):
        assert torch.equal(model.generate(ids, past_key_values=cache, **call), model.generate(ids, **call))
        assert cache.last_turn.cached_tokens == 0
        assert "LlamaForCausalLM uses a cache of its own" in cache.last_turn.miss_reason


def test_plain_dynamic_cache_works_beside_a_tiered_cache(model, used, generate, tokens):
    _, ids = used
    other = DynamicCache(config=model.config)
    generate(model, ids, other)
    assert other.get_seq_length() == ids.shape[1] + 7
