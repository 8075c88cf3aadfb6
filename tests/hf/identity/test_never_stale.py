"""Promise 2 (never stale): a change of anything besides tokens that decides K and V is a miss."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch.optim import optimizer as torch_optimizer
from transformers import AttentionInterface, GenerationMixin
from transformers.models.llama.modeling_llama import LlamaMLP, eager_attention_forward

from kvtier import PrefixStore, TieredCache, UninstalledError, uninstall
from tests.support.reuse import reuse_off
from tests.support.upstream import CACHE, PEFT_KNOWS_IT

pytestmark = [
    reuse_off,
    # Older transformers versions assume that offloaded models are on the meta device.
    pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate:UserWarning"),  # peft on IA3
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # asked for by peft
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # peft on its own LNTuning
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # peft on transformers' own ids
]
GREEDY = {"max_new_tokens": 8, "do_sample": False}
OTHER_MODEL = "the model is not the one that filled this cache"


def assert_turn(model, ids, cache, generate, cached, reason=None, **settings):
    """One turn equals plain generate(), reuses ``cached`` tokens, and has ``reason`` in its miss reason."""
    found = generate(model, ids, cache, **settings).sequences
    assert torch.equal(found, generate(model, ids, **settings).sequences)
    assert cache.last_turn.cached_tokens == cached
    if reason is not None:
        assert reason in cache.last_turn.miss_reason


# --- weights ----------------------------------------------------------------------------------------------------------


def all_weights(model):
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)


def one_element(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[3, 5] += 5


def one_element_with_gradient(model):
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.grad = torch.zeros_like(weight)
    weight.data[3, 5] += 5


def other_storage(model):
    weight = model.model.layers[0].self_attn.k_proj.weight
    changed = weight.data.clone()
    changed[3, 5] += 5
    weight.data = changed


def other_parameter(model):
    attention = model.model.layers[0].self_attn
    changed = attention.k_proj.weight.data.clone()
    changed[3, 5] += 5
    attention.k_proj.weight = torch.nn.Parameter(changed)


def other_parameter_in_the_same_place(model):
    attention = model.model.layers[0].self_attn
    data = attention.k_proj.weight.data
    data[3, 5] += 5
    attention.k_proj.weight = torch.nn.Parameter(data)


def other_angles(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def small_tensor_through_numpy(model):
    model.model.layers[0].input_layernorm.weight.detach().numpy()[7] = 9


@pytest.mark.parametrize(
    "edit",
    [
        all_weights,
        one_element,
        one_element_with_gradient,
        other_storage,
        other_parameter,
        other_parameter_in_the_same_place,
        other_angles,
        pytest.param(
            small_tensor_through_numpy, marks=pytest.mark.cpu_only("NumPy cannot reach the memory of a device")
        ),
    ],
)
def test_edited_weights_prevent_reuse(model, generate, tokens, cache, store, edit):
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)
    edit(model)
    assert_turn(model, ids, cache, generate, 0, OTHER_MODEL)
    with TieredCache(store) as other:
        assert_turn(model, ids, other, generate, 29)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("way", ["foreach", "fused"])
def test_optimizer_step_on_one_layer_prevents_reuse(model, generate, tokens, cache, optimizer, way):
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    steps = optimizer(model.model.layers[0].parameters(), lr=0.1, **{way: True})
    model(ids, labels=ids).loss.backward()
    steps.step()
    model.zero_grad()
    assert_turn(model, ids, cache, generate, 0)


def train_rows(model, rows, make_optimizer):
    """Make one step on a few rows of the embedding alone, as for new tokens, and leave no gradient or optimizer."""
    weight = model.model.embed_tokens.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[rows] = 1
    make_optimizer([weight]).step()
    model.zero_grad()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("in_prompt", [True, False])
def test_fused_step_on_embedding_rows_prevents_reuse(make_model, generate, tokens, cache, store, optimizer, in_prompt):
    """A fused step changes no version, and no sample covers the rows. Rows outside the prompt may be in the answer."""
    ids, model = tokens(30), make_model("llama", vocab_size=2000, tie_word_embeddings=True)
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)
    rows = ids[0, [3, 9]] if in_prompt else torch.tensor([1997, 1999])
    settings = {} if optimizer is torch.optim.SGD else {"weight_decay": 0}
    train_rows(model, rows, lambda weights: optimizer(weights, lr=0.5, fused=True, **settings))
    assert_turn(model, ids, cache, generate, 0, OTHER_MODEL)
    with TieredCache(store) as other:
        assert_turn(model, ids, other, generate, 29)


def test_uninstall_removes_the_optimizer_hooks(model, generate, tokens, cache):
    hooks = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    assert_turn(model, tokens(30), cache, generate, 0)
    watched = [len(some) for some in hooks]
    uninstall()
    assert [len(some) for some in hooks] == [count - 1 for count in watched]


def test_unversioned_edit_of_a_prompt_embedding_prevents_reuse(make_model, generate, tokens, cache):
    ids, model = tokens(30), make_model("llama", vocab_size=2000)
    assert_turn(model, ids, cache, generate, 0)
    model.model.embed_tokens.weight.data[ids[0, 9]] += 1
    assert_turn(model, ids, cache, generate, 0, OTHER_MODEL)
    assert_turn(model, ids, cache, generate, 29)


def test_edits_of_weights_made_in_inference_mode_prevent_reuse(make_model, generate, tokens, cache):
    """Tensors made in inference mode have no version."""
    ids = tokens(30)
    with torch.inference_mode():
        model = make_model("llama", vocab_size=2000)
        assert model.model.embed_tokens.weight.is_inference()
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)
    with torch.inference_mode():
        model.model.layers[0].self_attn.k_proj.weight[3, 5] += 5
        model.model.embed_tokens.weight[ids[0, 9], 7] += 5
    assert_turn(model, ids, cache, generate, 0, OTHER_MODEL)


def test_model_converted_by_swapping_tensors_is_not_reused(model, generate, tokens, cache, monkeypatch):
    """The conversion swaps tensors, as quantisers do. Swapping refuses tensors with weak references."""
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    model.to(torch.float64)
    assert_turn(model, ids, cache, generate, 0)
    state = {name: tensor.detach() + 0.01 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.cpu_only("the test device has no quantised tensors")
def test_quantised_buffer_turns_reuse_off(model, generate, tokens, cache):
    """Reading a quantised buffer like a plain tensor crashes the process."""
    ids = tokens(30)
    model.register_buffer("scales", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    for _ in range(2):
        assert_turn(model, ids, cache, generate, 0, "scales cannot be read: its dtype is torch.qint8")


@pytest.mark.parametrize("position", [(0, 0), (7, 33), (199, 63)])
def test_model_that_differs_in_one_element_is_not_reused(make_model, generate, tokens, cache, store, position):
    """No sample covers the element and the model is a new object, so only the values show the difference."""
    ids = tokens(30)
    ids[0, 3] = position[0] or 1
    assert_turn(make_model("llama"), ids, cache, generate, 0)
    other = make_model("llama")
    other.model.embed_tokens.weight.data[position] += 1e-3
    with TieredCache(store) as again:
        assert_turn(other, ids, again, generate, 0)


def test_another_model_of_the_same_shape_is_not_reused(make_model, generate, tokens, cache):
    ids, model, other = tokens(30), make_model("llama"), make_model("llama", rms_norm_eps=1e-2)
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(other, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)


def test_equal_copy_of_the_model_is_a_hit(make_model, generate, tokens, cache, store, family):
    ids = tokens(30)
    assert_turn(make_model(family), ids, cache, generate, 0)
    with TieredCache(store) as other:
        assert_turn(make_model(family), ids, other, generate, 29)


# --- config, modules, settings and namespace --------------------------------------------------------------------------


def config(model):
    model.config.rms_norm_eps = 0.1


def attribute(model):
    model.model.layers[0].input_layernorm.variance_epsilon = 1.0


def activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU().eval()


def implementation(model):
    model.set_attn_implementation("sdpa")


def double_precision(model):
    model.double()


def untied(model):
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj


@pytest.mark.parametrize("edit", [config, attribute, activation, implementation, double_precision, untied])
def test_edited_config_module_or_dtype_prevents_reuse(model, generate, tokens, cache, edit):
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    edit(model)
    assert_turn(model, ids, cache, generate, 0, OTHER_MODEL)
    assert_turn(model, ids, cache, generate, 29)


def test_replacing_the_forward_of_a_class_prevents_reuse(model, generate, tokens, cache, monkeypatch):
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    assert_turn(model, ids, cache, generate, 0, OTHER_MODEL)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)) * 2)
    assert_turn(model, ids, cache, generate, 0, OTHER_MODEL)


def test_reuse_follows_the_registered_attention_function(make_model, generate, tokens, cache):
    ids, model = tokens(30), make_model("llama")

    def mild(*args, scaling, **kwargs):
        return eager_attention_forward(*args, scaling=scaling / 2, **kwargs)

    def steep(*args, scaling, **kwargs):
        return eager_attention_forward(*args, scaling=scaling * 3, **kwargs)

    try:
        for function in (mild, steep, mild):
            AttentionInterface.register("test_never_stale", function)
            model.set_attn_implementation("test_never_stale")
            assert_turn(model, ids, cache, generate, 0 if cache.last_turn is None or function is steep else 29)
    finally:
        del AttentionInterface._global_mapping["test_never_stale"]


def test_autocast_prevents_reuse(model, generate, tokens, cache):
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, ids, cache)
        assert cache.last_turn.miss_reason == OTHER_MODEL


def test_another_namespace_is_not_reused(model, generate, tokens, tmp_path):
    ids = tokens(30)
    for namespace, cached in (("a", 0), ("b", 0), ("a", 29)):
        with PrefixStore(tmp_path, namespace=namespace) as store, TieredCache(store) as cache:
            assert_turn(model, ids, cache, generate, cached)


@pytest.mark.parametrize("where", ["model.layers.1.self_attn", "model"])
def test_training_mode_turns_reuse_off(make_model, generate, tokens, cache, where):
    """Attention applies dropout without a Dropout module."""
    model, ids = make_model("llama", attention_dropout=0.5), tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    model.get_submodule(where).train()
    generate(model, ids, cache)
    assert cache.last_turn.cached_tokens == 0
    assert "in training mode" in cache.last_turn.miss_reason
    model.eval()
    assert_turn(model, ids, cache, generate, 29)


# --- hooks and patches ------------------------------------------------------------------------------------------------


def steering_hook(module, inputs, output):
    return output + 5 if isinstance(output, torch.Tensor) else (output[0] + 5, *output[1:])


def steering_pre_hook(module, inputs):
    return tuple(x * 2 for x in inputs)


@pytest.mark.parametrize("kind", ["after", "before", "everywhere"])
def test_forward_hooks_turn_reuse_off(model, generate, tokens, cache, kind):
    ids, layer = tokens(30), model.model.layers[1]
    assert_turn(model, ids, cache, generate, 0)
    if kind == "after":
        handle, reason = layer.register_forward_hook(steering_hook), "steering_hook on model.layers.1"
    elif kind == "before":
        handle, reason = layer.mlp.register_forward_pre_hook(steering_pre_hook), "steering_pre_hook on model.layers.1"
    else:
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: output * 2 if isinstance(module, torch.nn.Linear) else None
        )
        reason = "on all modules"
    try:
        assert_turn(model, ids, cache, generate, 0, reason)
    finally:
        handle.remove()
    assert_turn(model, ids, cache, generate, 29)


def test_recording_hidden_states_keeps_reuse_on(model, generate, tokens, cache):
    """transformers records hidden states with its own hooks, which stay on the model."""
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0, output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.modules())
    assert_turn(model, ids, cache, generate, 29)


def test_spectral_norm_keeps_reuse_on(model, generate, tokens, cache):
    """The hook of spectral norm computes the weight from parameters that are in the root."""
    ids = tokens(30)
    torch.nn.utils.spectral_norm(model.model.layers[0].mlp.up_proj)
    generate(model, ids)  # computes the weight
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)


def test_replacing_the_forward_of_one_module_turns_reuse_off(model, generate, tokens, cache):
    ids, attention = tokens(30), model.model.layers[0].self_attn
    assert_turn(model, ids, cache, generate, 0)

    def louder(self, *args, **kwargs):
        output, weights = type(self).forward(self, *args, **kwargs)
        return output * 2, weights

    attention.forward = types.MethodType(louder, attention)
    assert_turn(model, ids, cache, generate, 0, "forward of model.layers.0.self_attn was replaced by")
    attention.forward = types.MethodType(type(attention).forward, attention)
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)


def test_only_user_hooks_in_accelerate_turn_reuse_off(model, generate, tokens, cache):
    """The hooks of accelerate move weights and inputs. A user's ``ModelHook`` may do anything."""
    from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module

    class Louder(ModelHook):
        def post_forward(self, module, output):
            return output * 2

    ids = tokens(30)
    add_hook_to_module(model.model.layers[0].mlp, ModelHook())
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)
    add_hook_to_module(model.model.layers[0].mlp, SequentialHook(ModelHook(), Louder()))
    assert_turn(model, ids, cache, generate, 0, "Louder on model.layers.0.mlp")


def test_forward_replaced_below_an_accelerate_hook_turns_reuse_off(model, generate, tokens, cache):
    from accelerate.hooks import ModelHook, add_hook_to_module

    ids, mlp = tokens(30), model.model.layers[0].mlp
    assert_turn(model, ids, cache, generate, 0)
    mlp.forward = lambda x: LlamaMLP.forward(mlp, x) * 2
    add_hook_to_module(mlp, ModelHook())
    assert_turn(model, ids, cache, generate, 0, "forward of model.layers.0.mlp was replaced by")


# --- offloaded and quantised weights ----------------------------------------------------------------------------------


def test_weights_offloaded_to_ram_are_reused_until_edited(make_model, generate, tokens, cache, store):
    from accelerate import cpu_offload

    ids, model, plain = tokens(30), make_model("llama"), make_model("llama")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cpu_offload(model, execution_device="cpu", state_dict=state)
    assert next(model.parameters()).is_meta
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)
    state["model.layers.0.self_attn.k_proj.weight"][3, 5] += 5
    assert_turn(model, ids, cache, generate, 0, OTHER_MODEL)
    assert_turn(plain, ids, cache, generate, 0)


def test_weights_offloaded_to_disk_turn_reuse_off(model, generate, tokens, cache, tmp_path):
    from accelerate import disk_offload

    ids = tokens(30)
    disk_offload(model, str(tmp_path / "offload"), execution_device="cpu")
    for _ in range(2):
        assert_turn(model, ids, cache, generate, 0, "weight cannot be read")


class Halved(torch.Tensor):
    """A weight stored in two parts, like a quantised weight. Only ``OpenHalved`` shows its parts."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        whole = [a.values * a.scale if isinstance(a, Halved) else a for a in args]
        if function not in (torch.ops.aten.mm.default, torch.ops.aten.t.default):
            raise NotImplementedError(f"{function} of a halved tensor")
        return function(*whole, **(kwargs or {}))


class OpenHalved(Halved):
    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return OpenHalved(inner["values"], inner["scale"])


def test_quantised_weight_is_reused_until_its_scale_changes(model, generate, tokens, cache):
    ids, up = tokens(30), model.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(OpenHalved(up.weight.data, torch.tensor(1.0)), requires_grad=False)
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)
    up.weight.scale.fill_(3.0)
    assert_turn(model, ids, cache, generate, 0, OTHER_MODEL)


def test_unreadable_weights_turn_reuse_off(model, generate, tokens, cache):
    ids, up = tokens(30), model.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(Halved(up.weight.data, torch.tensor(1.0)), requires_grad=False)
    for _ in range(2):
        assert_turn(model, ids, cache, generate, 0, "up_proj.weight cannot be read")


# --- arguments of generate() ------------------------------------------------------------------------------------------


def test_inputs_embeds_do_not_match_the_ids_beside_them(model, generate, tokens, cache):
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    other = model.get_input_embeddings()(tokens(30, seed=1))
    for given, known in (({}, 0), ({"inputs": ids}, 25)):
        expected = model.generate(inputs_embeds=other, **given, **GREEDY)
        assert torch.equal(model.generate(inputs_embeds=other, past_key_values=cache, **given, **GREEDY), expected)
        assert cache.last_turn.cached_tokens == known
    assert_turn(model, ids, cache, generate, 29)


def test_explicit_position_ids_limit_reuse_to_equal_positions(model, generate, tokens, cache):
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29, position_ids=torch.arange(30)[None])
    assert_turn(model, ids, cache, generate, 0, position_ids=torch.arange(30)[None] + 2)
    later = torch.cat([torch.arange(20), torch.arange(24, 34)])[None]
    assert_turn(model, ids, cache, generate, 20, position_ids=later)
    assert_turn(model, ids, cache, generate, 29, position_ids=later)
    assert_turn(model, ids, cache, generate, 29)


def test_unknown_model_flag_turns_reuse_off(model, generate, tokens, cache):
    """The flag is not a tensor, but it decides which tokens attention sees."""
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 0, "is_causal", is_causal=True)
    assert_turn(model, ids, cache, generate, 29, is_causal=None)


def decode_something_else(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    cache = kwargs[CACHE]
    model(input_ids.flip(1), **{CACHE: cache})
    return torch.cat([input_ids, input_ids[:, :1]], 1)


def test_custom_generate_turns_reuse_off(model, generate, tokens, cache):
    """Custom decoding may feed any tokens and return others."""
    ids = tokens(30)
    model.generate(ids, past_key_values=cache, custom_generate=decode_something_else, **GREEDY)
    assert "custom generate" in cache.last_turn.miss_reason
    assert_turn(model, ids, cache, generate, 0)


def test_token_healing_turns_reuse_off(model, generate, tokens, cache, monkeypatch):
    """The generation config is passed by position."""
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    monkeypatch.setattr(type(model), "heal_tokens", lambda self, input_ids, tokenizer: input_ids.flip(1), raising=False)
    settings = type(model.generation_config)(token_healing=True, pad_token_id=0, **GREEDY)
    expected = model.generate(ids, settings)
    assert torch.equal(model.generate(ids, settings, past_key_values=cache), expected)
    assert cache.last_turn.miss_reason == "token healing rewrites the prompt"


def test_guidance_with_a_negative_prompt_reuses_the_prompt(model, generate, tokens, cache):
    """The negative prompt runs in a separate cache."""
    ids, negative = tokens(30), tokens(30, seed=1)
    settings = {"guidance_scale": 2.0, "negative_prompt_ids": negative}
    assert_turn(model, ids, cache, generate, 0, **settings)
    assert_turn(model, ids, cache, generate, 29, **settings)
    assert_turn(model, ids, cache, generate, 29)


def test_nested_generate_turns_reuse_off_and_keeps_the_prompt(model, generate, tokens, cache):
    """Some decoding methods call generate() again, with the same cache, inside the turn."""
    ids = tokens(30)

    def again(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return model.generate(input_ids, past_key_values=kwargs[CACHE], **GREEDY)

    expected = generate(model, ids).sequences
    found = model.generate(ids, past_key_values=cache, custom_generate=again, **GREEDY, suppress_tokens=[0])
    assert torch.equal(found[:, :30], expected[:, :30])
    assert "custom generate" in cache.last_turn.miss_reason
    assert_turn(model, ids, cache, generate, 29)  # the inner call fed the prompt


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapted(model, kind):
    """Return ``model`` with two adapters, ``one`` and ``two``. Both change its output."""
    peft = pytest.importorskip("peft")
    attention = ["q_proj", "k_proj", "v_proj"]
    kinds = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=attention, init_lora_weights=False),
        "dora": lambda: peft.LoraConfig(r=4, target_modules=attention, init_lora_weights=False, use_dora=True),
        "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_modules=attention, total_step=10),
        "loha": lambda: peft.LoHaConfig(r=4, target_modules=attention, init_weights=False),
        "lokr": lambda: peft.LoKrConfig(r=4, target_modules=attention, init_weights=False),
        "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=attention, init_weights=False),
        "ia3": lambda: peft.IA3Config(target_modules=attention, feedforward_modules=[], init_ia3_weights=False),
        "ln": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "p-tuning": lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16
        ),
    }
    torch.manual_seed(1)
    model = peft.get_peft_model(model, kinds[kind](), adapter_name="one")
    if kind == "adalora":
        model.peft_config["one"].inference_mode = True
    model.add_adapter("two", kinds[kind]())
    for name, parameter in model.named_parameters():
        if ".two" in name or ".one" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.5)
    return model.eval()


@pytest.mark.sample(3)  # of 9
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "loha", "lokr", "vera", "oft", "ia3", "ln"])
def test_adapter_switch_prevents_reuse(model, generate, tokens, cache, kind):
    ids, model = tokens(30), adapted(model, kind)
    model.set_adapter("one")
    assert_turn(model, ids, cache, generate, 0)
    model.set_adapter("two")
    assert_turn(model, ids, cache, generate, 0)
    model.set_adapter("one")
    assert_turn(model, ids, cache, generate, 29)


@pytest.mark.parametrize("kind", ["lora", "loha", "ia3", "ln"])
def test_disabling_an_adapter_prevents_reuse(model, generate, tokens, cache, kind):
    ids, model = tokens(30), adapted(model, kind)
    model.set_adapter("one")
    assert_turn(model, ids, cache, generate, 0)
    with model.disable_adapter():
        assert_turn(model, ids, cache, generate, 0)
    assert_turn(model, ids, cache, generate, 29)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("change", ["switched", "disabled"])
def test_reuse_depends_on_the_adapter_state_of_each_layer(model, generate, tokens, cache, kind, change):
    """The adapters and their states stay the same; only the layers differ."""
    ids, model = tokens(30), adapted(model, kind)
    model.set_adapter("one")
    layers = [layer.self_attn.k_proj for layer in model.get_base_model().model.layers]

    def change_layer(number):
        for index, layer in enumerate(layers):
            if change == "switched":
                layer.set_adapter("two" if index == number else "one")
            else:
                layer.enable_adapters(index != number)

    for number, cached in ((0, 0), (1, 0), (0, 29)):
        change_layer(number)
        assert_turn(model, ids, cache, generate, cached)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_merging_an_adapter_prevents_reuse(model, generate, tokens, cache, kind):
    ids, model = tokens(30), adapted(model, kind)
    model.set_adapter("one")
    assert_turn(model, ids, cache, generate, 0)
    model.merge_adapter(["one"])
    assert_turn(model, ids, cache, generate, 0)
    model.unmerge_adapter()
    model.set_adapter("two")
    assert_turn(model, ids, cache, generate, 0)


def test_scaling_an_adapter_prevents_reuse(model, generate, tokens, cache):
    ids, model = tokens(30), adapted(model, "lora")
    model.set_adapter("one")
    assert_turn(model, ids, cache, generate, 0)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("one", 3.0)
    assert_turn(model, ids, cache, generate, 0)


def test_adapter_names_per_row_turn_reuse_off(model, generate, tokens, cache):
    """In PEFT every row of a batch can name its adapter. The model itself does not show which."""
    ids, model = tokens(30), adapted(model, "lora")
    for name in ("one", "two", "one"):
        assert_turn(model, ids, cache, generate, 0, "_adapter_names_pre_forward_hook", adapter_names=[name])


@pytest.mark.skipif(not PEFT_KNOWS_IT, reason="this transformers wants a newer PEFT")
@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
def test_prompt_learning_turns_reuse_off(model, generate, tokens, cache, store, kind):
    """Prompt learning feeds the model virtual tokens that are not in the prompt."""
    ids = tokens(30)
    assert_turn(model, ids, cache, generate, 0)
    model = adapted(model, kind)
    model.set_adapter("one")
    settings = {**GREEDY, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(input_ids=ids, **settings)
    for again in (cache, cache, TieredCache(store)):
        assert torch.equal(model.generate(input_ids=ids, past_key_values=again, **settings), expected)
        assert again.last_turn.cached_tokens == 0
        assert "prepare_inputs_for_generation of the model was replaced" in again.last_turn.miss_reason


def test_prompt_learning_turns_reuse_off_in_a_custom_loop(model, tokens, cache):
    model = adapted(model, "prompt")
    report = cache.begin(model, tokens(30))
    assert "virtual tokens" in report.miss_reason


# --- positions that depend on the length of the sequence --------------------------------------------------------------


def long_rope(make_model):
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


def dynamic_rope(make_model):
    return make_model(
        "llama",
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    )


@pytest.mark.sample(5)  # of 8
@pytest.mark.parametrize("kind", [long_rope, dynamic_rope])
@pytest.mark.parametrize("lengths", [(60, 20), (20, 60), (28, 28), (31, 60)])
def test_rope_that_depends_on_length_turns_reuse_off(make_model, generate, tokens, store, kind, lengths):
    """Short and long sequences use other RoPE angles: a long prompt and a short one with the same first tokens differ
    in K. A prompt of 28 tokens crosses the threshold during generation."""
    ids = tokens(60)
    for length in lengths:
        for model in (kind(make_model), kind(make_model)):
            with TieredCache(store) as cache:
                found = generate(model, ids[:, :length], cache).sequences
                assert torch.equal(found, generate(kind(make_model), ids[:, :length]).sequences)
                assert "depend on the length of the sequence" in cache.last_turn.miss_reason


# --- the hook on generate() -------------------------------------------------------------------------------------------


@pytest.fixture
def unhooked():
    """Restore the original ``GenerationMixin.generate`` of transformers before and after the test."""
    uninstall()
    plain = GenerationMixin.generate
    yield plain
    GenerationMixin.generate = plain
    uninstall()


def wrap_generate(wraps):
    """Wrap the current generate() and return the list of the wrapper's calls."""
    below, calls = GenerationMixin.generate, []

    def counting(self, *args, **kwargs):
        calls.append(kwargs)
        return below(self, *args, **kwargs)

    GenerationMixin.generate = functools.wraps(below)(counting) if wraps else counting
    return calls


def test_uninstall_restores_the_original_generate(unhooked, model, generate, tokens, store):
    with TieredCache(store) as cache:
        assert GenerationMixin.generate is not unhooked
        uninstall()
        assert GenerationMixin.generate is unhooked
        with pytest.raises(UninstalledError):
            generate(model, tokens(30), cache)


@pytest.mark.parametrize("wraps", [True, False])
def test_uninstall_keeps_a_wrapper_above_the_hook(unhooked, model, generate, tokens, store, wraps):
    """The inactive hook passes every call through. The next cache activates it again: one turn per call, not two."""
    ids = tokens(30)
    with TieredCache(store) as cache:
        calls = wrap_generate(wraps)
        top = GenerationMixin.generate
        uninstall()
        assert GenerationMixin.generate is top
        with pytest.raises(UninstalledError):
            generate(model, ids, cache)
    with TieredCache(store) as cache:
        assert_turn(model, ids, cache, generate, 0)
        assert_turn(model, ids, cache, generate, 29)
        uninstall()
        assert GenerationMixin.generate is top
    assert len(calls) == 5


def test_uninstall_disables_hooks_above_and_below_another_wrapper(unhooked, model, generate, tokens, store):
    with TieredCache(store):
        wrap_generate(wraps=False)
        top = GenerationMixin.generate
        with TieredCache(store) as cache:
            assert GenerationMixin.generate is not top  # the cache cannot see the hook below the wrapper
            uninstall()
            assert GenerationMixin.generate is top
            with pytest.raises(UninstalledError):
                generate(model, tokens(30), cache)
