"""Promise 2: whatever decides K and V besides tokens, when it changes, is a miss."""

from __future__ import annotations

import pytest
import torch

from kvtier import PrefixStore, TieredCache

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # asked for by peft
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # peft on its own LNTuning
]


def assert_turn(model, ids, cache, generate, cached):
    assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)
    assert cache.last_turn.cached_tokens == cached


def test_weights_edited_in_place(model, generate, tokens, cache, store):
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    assert_turn(model, ids, cache, generate, 0)
    assert cache.last_turn.miss_reason == "the model is not the one that filled this cache"
    with TieredCache(store) as other:
        assert_turn(model, ids, other, generate, 29)


def test_optimizer_step_on_one_layer(model, generate, tokens, cache):
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    optimizer = torch.optim.SGD(model.model.layers[0].parameters(), lr=1.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert_turn(model, ids, cache, generate, 0)


def test_other_model_of_the_same_shape(make_model, generate, tokens, cache):
    ids, model, other = tokens(30), make_model("llama"), make_model("llama", rms_norm_eps=1e-2)
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(other, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)


def test_twin_of_the_model_is_a_hit(make_model, generate, tokens, cache, store):
    ids = tokens(30)
    assert_turn(make_model("llama"), ids, cache, generate, 0)
    with TieredCache(store) as other:
        assert_turn(make_model("llama"), ids, other, generate, 29)


@pytest.mark.parametrize("change", ["dtype", "attention"])
def test_other_arithmetic(make_model, generate, tokens, cache, change):
    ids, model = tokens(30), make_model("llama")
    assert_turn(model, ids, cache, generate, 0)
    other = make_model("llama", torch.float64) if change == "dtype" else make_model("llama", attention="sdpa")
    assert_turn(other, ids, cache, generate, 0)


def test_other_namespace(model, generate, tokens, tmp_path):
    ids = tokens(30)
    for namespace, cached in (("a", 0), ("b", 0), ("a", 29)):
        with PrefixStore(tmp_path, namespace=namespace) as store, TieredCache(store) as cache:
            assert_turn(model, ids, cache, generate, cached)


def test_training_mode_with_dropout_is_off(make_model, generate, tokens, cache):
    model, ids = make_model("llama", attention_dropout=0.0), tokens(30)
    model.model.add_module("dropout", torch.nn.Dropout(0.5))
    assert_turn(model, ids, cache, generate, 0)
    model.train()
    generate(model, ids, cache)
    assert cache.last_turn.miss_reason == "the model is in training mode with dropout"
    model.eval()
    assert_turn(model, ids, cache, generate, 29)


def test_embeddings_instead_of_ids_are_off(model, generate, tokens, cache):
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    other = model.get_input_embeddings()(tokens(30, seed=1))
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(inputs_embeds=other, **settings)
    assert torch.equal(model.generate(inputs_embeds=other, past_key_values=cache, **settings), expected)
    assert cache.last_turn.cached_tokens == 0
    assert "inputs_embeds" in cache.last_turn.miss_reason
    assert_turn(model, ids, cache, generate, 29)


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapted(model, kind):
    """``model`` with two adapters, ``one`` and ``two``, both of which change what it says."""
    peft = pytest.importorskip("peft")
    kinds = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False
        ),
        "ln": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }
    torch.manual_seed(1)
    model = peft.get_peft_model(model, kinds[kind](), adapter_name="one")
    model.add_adapter("two", kinds[kind]())
    for name, parameter in model.named_parameters():
        if ".two" in name or ".one" in name:
            parameter.data.add_(torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("kind", ["lora", "ia3", "ln"])
def test_adapter_switch(model, generate, tokens, cache, kind):
    ids, model = tokens(30), adapted(model, kind)
    model.set_adapter("one")
    assert_turn(model, ids, cache, generate, 0)
    model.set_adapter("two")
    assert_turn(model, ids, cache, generate, 0)
    model.set_adapter("one")
    assert_turn(model, ids, cache, generate, 29)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapter_disabled(model, generate, tokens, cache, kind):
    ids, model = tokens(30), adapted(model, kind)
    model.set_adapter("one")
    assert_turn(model, ids, cache, generate, 0)
    with model.disable_adapter():
        assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)


def test_adapter_scaled(model, generate, tokens, cache):
    ids, model = tokens(30), adapted(model, "lora")
    model.set_adapter("one")
    assert_turn(model, ids, cache, generate, 0)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("one", 3.0)
    assert_turn(model, ids, cache, generate, 0)


def test_adapter_names_of_single_rows(model, generate, tokens, cache):
    """PEFT lets every row of a batch name its adapter; the model itself does not say which."""
    ids, model = tokens(30), adapted(model, "lora")
    for name in ("one", "two", "one"):
        found = generate(model, ids, cache, adapter_names=[name]).sequences
        assert torch.equal(found, generate(model, ids, adapter_names=[name]).sequences)


def test_virtual_tokens(model, generate, tokens, cache, store):
    """Prompt tuning feeds the model tokens that no prompt names."""
    ids, model = tokens(30), adapted(model, "prompt")
    model.set_adapter("one")
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(input_ids=ids, **settings)
    for again in (cache, cache, TieredCache(store)):
        assert torch.equal(model.generate(input_ids=ids, past_key_values=again, **settings), expected)


# --- positions that depend on the length of the sequence --------------------------------------------------------------


def test_rope_that_changes_with_length(make_model, generate, tokens, store):
    """``longrope`` turns short sequences by other angles than long ones: the K of a long prompt is not that of a
    short one with the same first tokens."""

    def long_rope():
        return make_model(
            "phi3",
            max_position_embeddings=128,
            original_max_position_embeddings=32,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 32,
            },
        )

    ids = tokens(60)
    with TieredCache(store) as cache:
        assert torch.equal(generate(long_rope(), ids, cache).sequences, generate(long_rope(), ids).sequences)
    with TieredCache(store) as cache:
        short = ids[:, :20]
        assert torch.equal(generate(long_rope(), short, cache).sequences, generate(long_rope(), short).sequences)
