"""Adapters, dtypes, positions and kernels: after each change the answer equals that of a fresh cache."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvtier import TieredCache
from kvtier.hf.identity.fingerprint import Identity, identify
from tests.support.reuse import reuse_off
from tests.support.upstream import PEFT_KNOWS_IT

pytestmark = [
    reuse_off,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # asked for by peft
    pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
]
OTHER_MODEL = "the model is not the one that filled this cache"


@pytest.fixture
def turn(generate, tokens):
    """``turn(model, cache)`` runs one turn, compares it with a fresh cache, and returns the number of reused tokens."""

    def run(model, cache, **settings):
        ids = tokens(30)
        found = generate(model, ids, cache, **settings).sequences
        assert torch.equal(found, generate(model, ids, **settings).sequences)
        return cache.last_turn.cached_tokens

    return run


# --- adapters ---------------------------------------------------------------------------------------------------------


def lora(peft, **settings):
    return peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, **settings)


@pytest.fixture
def peft_model(model):
    """A model with the LoRA adapters ``one`` and ``two``. Neither is close to zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, lora(peft), adapter_name="one")
    model.add_adapter("two", lora(peft))
    model.set_adapter("one")
    return model.eval()


def both_active(model):
    model.base_model.set_adapter(["one", "two"])


def two_active(model):
    model.set_adapter("two")


def merged(model):
    model.merge_adapter(["one"])


def both_merged(model):
    both_active(model)
    model.merge_adapter()


def merged_safely(model):
    model.merge_adapter(["one"], safe_merge=True)


def scaled_by_attribute(model):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["one"] *= 3


def scaled_by_method(model):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)


def disabled(model):
    model.base_model.disable_adapter_layers()


def weighted_sum(model):
    model.add_weighted_adapter(["one", "two"], [0.7, 0.6], "sum", combination_type="linear")
    model.set_adapter("sum")


def other_weights_under_the_name(model):
    import peft

    model.delete_adapter("one")
    torch.manual_seed(9)
    model.add_adapter("one", lora(peft))
    model.set_adapter("one")


def other_weights_loaded_in_place(model):
    import peft

    state = peft.get_peft_model_state_dict(model, adapter_name="one")
    peft.set_peft_model_state_dict(model, {name: weight * 1.5 for name, weight in state.items()}, adapter_name="one")


def trained(model):
    for name, parameter in model.named_parameters():
        if ".one." in name:
            with torch.no_grad():
                parameter.mul_(1.5)


CHANGES = [
    both_active,
    two_active,
    merged,
    both_merged,
    merged_safely,
    scaled_by_attribute,
    scaled_by_method,
    disabled,
    weighted_sum,
    other_weights_under_the_name,
    other_weights_loaded_in_place,
    trained,
]


@pytest.mark.sample(6)  # of 12
@pytest.mark.parametrize("change", CHANGES)
def test_adapter_change_prevents_reuse(peft_model, cache, store, turn, change):
    assert turn(peft_model, cache) == 0
    assert turn(peft_model, cache) == 29
    change(peft_model)
    assert turn(peft_model.eval(), cache) == 0
    assert cache.last_turn.miss_reason == OTHER_MODEL
    with TieredCache(store) as other:
        assert turn(peft_model, other) == 29


def test_active_adapters_in_another_order_give_correct_answers(peft_model, cache, turn):
    """Adapters are added in their order, so rounding may differ. Reused or not, the answer is correct."""
    both_active(peft_model)
    assert turn(peft_model, cache) == 0
    peft_model.base_model.set_adapter(["two", "one"])
    turn(peft_model, cache)
    both_active(peft_model)
    assert turn(peft_model, cache) == 29


def test_unmerged_adapter_is_reused_only_if_weights_are_equal(peft_model, cache, turn):
    """Unmerging may round the base weights differently. Only unchanged base weights must be a hit again."""
    assert turn(peft_model, cache) == 0
    peft_model.merge_adapter(["one"])
    assert turn(peft_model, cache) == 0
    peft_model.unmerge_adapter()
    weights = peft_model.state_dict()
    assert turn(peft_model, cache) in (0, 29)
    peft_model.merge_adapter(["one"])
    peft_model.unmerge_adapter()
    same = all(torch.equal(weights[name], tensor) for name, tensor in peft_model.state_dict().items())
    assert turn(peft_model, cache) >= (29 if same else 0)


def test_merge_and_unload_prevents_reuse(peft_model, cache, turn):
    assert turn(peft_model, cache) == 0
    plain = peft_model.merge_and_unload()
    assert turn(plain, cache) == 0


def test_unloading_an_adapter_restores_hits_of_the_base_model(peft_model, make_model, cache, store, turn):
    assert turn(make_model("llama"), cache) == 0
    assert turn(peft_model, cache) == 0
    assert turn(peft_model.unload().eval(), cache) == 29


@pytest.mark.skipif(not PEFT_KNOWS_IT, reason="this transformers wants a newer PEFT")
@pytest.mark.parametrize("change", ["set_adapter", "disable_adapters", "delete_adapter"])
def test_change_of_an_adapter_added_by_transformers_prevents_reuse(model, cache, store, turn, change):
    """``model.add_adapter``: PEFT's layers in a model that is not a PeftModel."""
    peft = pytest.importorskip("peft")
    assert turn(model, cache) == 0
    torch.manual_seed(1)
    for name in ("one", "two"):
        model.add_adapter(lora(peft), adapter_name=name)
    model.set_adapter("one")
    assert turn(model.eval(), cache) == 0
    if change == "set_adapter":
        model.set_adapter("two")
    elif change == "disable_adapters":
        model.disable_adapters()
    else:
        model.delete_adapter("one")
        torch.manual_seed(9)
        model.add_adapter(lora(peft), adapter_name="one")
        model.set_adapter("one")
    assert turn(model.eval(), cache) == 0
    assert turn(model, cache) == 29


# --- dtypes, devices, weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_dtype_conversion_prevents_reuse(model, cache, turn, convert):
    assert turn(model, cache) == 0
    convert(model)
    assert turn(model, cache) == 0
    assert cache.last_turn.miss_reason == OTHER_MODEL
    assert turn(model, cache) == 29
    model.float()
    assert turn(model, cache) in (0, 29)


def test_rounding_one_layer_prevents_reuse(model, cache, generate, tokens, turn):
    assert turn(model, cache) == 0
    model.model.layers[1].mlp.double().float()  # rounds nothing: the same model
    assert turn(model, cache) == 29
    model.model.layers[1].mlp.bfloat16().float()
    assert turn(model, cache) == 0


def test_moving_weights_in_memory_keeps_reuse(model, cache, store, turn):
    assert turn(model, cache) == 0
    model.to(memory_format=torch.contiguous_format)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    assert turn(model, cache) == 29
    model.share_memory()
    assert turn(model, cache) == 29


@pytest.mark.parametrize("tied", [True, False])
def test_edits_of_head_or_embedding_prevent_reuse(make_model, cache, turn, tied):
    """The head does not decide K and V, but the embedding does. kvtier treats both alike."""
    model = make_model("llama", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert turn(model, cache) == 0
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1
    assert turn(model, cache) == 0
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert turn(model, cache) in (0, 29)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] += 1
    assert turn(model, cache) == 0


class Doubled(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, weight):
        return weight * self.factor


def test_parametrization_changes_prevent_reuse(model, cache, turn):
    projection = model.model.layers[0].self_attn.k_proj
    assert turn(model, cache) == 0
    parametrize.register_parametrization(projection, "weight", Doubled(2.0))
    assert turn(model.eval(), cache) == 0
    with torch.no_grad():
        projection.parametrizations.weight[0].factor.fill_(3.0)
    assert turn(model, cache) == 0
    assert turn(model, cache) == 29
    parametrize.remove_parametrizations(projection, "weight")
    assert turn(model, cache) == 0


def test_pruning_and_mask_edits_prevent_reuse(model, cache, turn):
    """The mask is a buffer. PyTorch's hook applies it."""
    projection = model.model.layers[0].self_attn.k_proj
    assert turn(model, cache) == 0
    prune.l1_unstructured(projection, "weight", amount=0.5)
    assert turn(model, cache) == 0
    assert turn(model, cache) == 29
    projection.weight_mask.zero_()
    assert turn(model, cache) == 0


# --- positions --------------------------------------------------------------------------------------------------------

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def rope_of_the_config(model):
    model.config.rope_parameters = LINEAR


def rope_of_a_new_module(model):
    model.config.rope_parameters = LINEAR
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)


def theta_of_the_config(model):
    model.config.rope_parameters["rope_theta"] = 500.0


def factor_of_the_module(model):
    model.model.rotary_emb.attention_scaling = 1.5


def angles_of_the_module(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq / 4


ROPES = [rope_of_the_config, rope_of_a_new_module, theta_of_the_config, factor_of_the_module, angles_of_the_module]


@pytest.mark.parametrize("change", ROPES)
def test_edits_of_rotary_positions_prevent_reuse(model, cache, turn, change):
    assert turn(model, cache) == 0
    change(model)
    assert turn(model.eval(), cache) == 0
    assert cache.last_turn.miss_reason == OTHER_MODEL
    assert turn(model, cache) == 29


@pytest.mark.parametrize(
    "rope",
    [LINEAR, {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}],
)
def test_models_with_other_rope_parameters_do_not_share_prefixes(make_model, store, turn, rope):
    for settings, cached in (({}, 0), ({"rope_parameters": rope}, 0), ({"rope_parameters": rope}, 29), ({}, 29)):
        with TieredCache(store) as cache:
            assert turn(make_model("llama", **settings), cache) == cached


# --- kernels, precision and compilation -------------------------------------------------------------------------------


def test_reuse_depends_on_the_attention_implementation(model, cache, turn):
    for implementation, cached in (("eager", 0), ("sdpa", 0), ("eager", 29), ("sdpa", 29)):
        model.set_attn_implementation(implementation)
        assert turn(model, cache) == cached
    model.model.layers[0].self_attn.config = type(model.config)(**model.config.to_dict())
    model.model.layers[0].self_attn.config._attn_implementation = "eager"  # of one layer alone
    assert turn(model, cache) == 0


def test_experts_implementation_change_prevents_reuse(make_model, store, turn):
    model = make_model("gpt_oss")
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("this version of transformers has one implementation of experts")
    with TieredCache(store) as cache:
        assert turn(model, cache) == 0
        model.set_experts_implementation("batched_mm")
        assert turn(model, cache) == 0
        assert turn(model, cache) == 29


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_prevents_reuse_until_restored(model, cache, turn, precision):
    assert turn(model, cache) == 0
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert turn(model, cache) == 0
    finally:
        torch.set_float32_matmul_precision(before)
    assert turn(model, cache) == 29


def test_reuse_depends_on_the_autocast_dtype(model, cache, generate, tokens, turn):
    ids = tokens(30)
    assert turn(model, cache) == 0
    for dtype in (torch.bfloat16, torch.float16):
        for cached in (0, 29):
            with torch.autocast("cpu", dtype):
                generate(model, ids, cache)
            assert cache.last_turn.cached_tokens == cached
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert turn(model, cache) == 29


def compiled(model):
    layer = model.model.layers[1]
    layer.mlp = torch.compile(layer.mlp, backend="eager")
    return layer.mlp._orig_mod


def compiled_in_place(model):
    model.model.layers[1].mlp.compile(backend="eager")
    return model.model.layers[1].mlp


@pytest.mark.parametrize("compile_it", [compiled, compiled_in_place])
@pytest.mark.cpu_only("torch.compile does not know the streams of the test device")
def test_compiled_modules_are_distinct_and_their_edits_prevent_reuse(model, cache, store, turn, compile_it):
    """A compiled module may round differently. Its weights, code and hooks still count."""
    assert turn(model, cache) == 0
    inner = compile_it(model)
    assert turn(model, cache) == 0
    assert cache.last_turn.miss_reason == OTHER_MODEL
    assert turn(model, cache) == 29
    with torch.no_grad():
        inner.up_proj.weight[3, 5] += 5
    assert turn(model, cache) == 0
    assert cache.last_turn.miss_reason == OTHER_MODEL
    assert turn(model, cache) == 29
    inner.up_proj.forward = lambda x: torch.nn.functional.linear(x, inner.up_proj.weight) * 2
    torch._dynamo.reset()
    assert turn(model, cache) == 0
    assert "forward of model.layers.1.mlp" in cache.last_turn.miss_reason


def test_forward_replaced_by_a_hidden_module_turns_reuse_off(model, cache, turn):
    """No compiler made this forward, so the weights behind it are unknown."""
    hidden = torch.nn.Linear(64, 64, bias=False)
    assert turn(model, cache) == 0
    model.model.layers[1].mlp.forward = hidden.__call__
    assert turn(model, cache) == 0
    assert "forward of model.layers.1.mlp was replaced" in cache.last_turn.miss_reason


# --- quantised weights ------------------------------------------------------------------------------------------------


def torchao_int8(model, folder):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    return model


def torchao_int4(model, folder):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model.model, quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4))
    return model


def torchao_int8_dynamic(model, folder):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model.model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def quanto_int8(model, folder):
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def bitsandbytes(model, folder, **settings):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    model.to(torch.bfloat16).save_pretrained(folder)
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def bitsandbytes_int8(model, folder):
    return bitsandbytes(model, folder, load_in_8bit=True)


def bitsandbytes_4bit(model, folder):
    return bitsandbytes(model, folder, load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_q8(model, folder):
    """Write a file of eight-bit weights. transformers unpacks them."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    packed, config = gguf.GGMLQuantizationType.Q8_0, model.config
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in GGUF_NAMES.items()}
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for name, weight in model.state_dict().items():
        values, name = weight.cpu().numpy(), names[name.removesuffix(".weight")] + ".weight"
        is_packed = values.ndim == 2
        writer.add_tensor(
            name, gguf.quants.quantize(values, packed) if is_packed else values, raw_dtype=packed if is_packed else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")


QUANTISED = [gguf_q8, torchao_int8, torchao_int4, torchao_int8_dynamic, quanto_int8, bitsandbytes_4bit]


@pytest.mark.filterwarnings("ignore")  # from the quantisation packages
@pytest.mark.parametrize("quantised", QUANTISED)
def test_only_equal_quantised_weights_are_reused(make_model, store, generate, tokens, turn, tmp_path, quantised):
    def make(folder, **settings):
        model = quantised(make_model("llama", **settings), tmp_path / folder).eval()
        model.generation_config.pad_token_id = 0
        generate(model, tokens(4))  # bitsandbytes packs its weights in the first pass: another root from then on
        return model

    plain = make_model("llama", torch.bfloat16 if "bitsandbytes" in quantised.__name__ else torch.float32)
    one, twin = make("one"), make("twin")
    with TieredCache(store) as cache:
        assert turn(plain, cache) == 0
        assert turn(one, cache) == 0
        assert turn(one, cache) == 29
        assert turn(twin, cache) == 29
    other = make_model("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.mul_(-1)
    other = quantised(other, tmp_path / "other").eval()
    other.generation_config.pad_token_id = 0
    with TieredCache(store) as cache:
        assert turn(other, cache) == 0


@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_int8_turns_reuse_off(make_model, cache, turn, tmp_path):
    """bitsandbytes int8 handles columns separately where any token is large: a token fed alone gives other values."""
    model = bitsandbytes_int8(make_model("llama"), tmp_path).eval()
    model.generation_config.pad_token_id = 0
    for _ in range(2):
        assert turn(model, cache) == 0
        assert "with regard to the tokens that are fed with it" in cache.last_turn.miss_reason


# --- models spread over processes -------------------------------------------------------------------------------------

RANK = """
import sys, torch, torch.distributed as dist
from transformers import LlamaForCausalLM
from kvtier import PrefixStore, TieredCache
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
plain = LlamaForCausalLM.from_pretrained(folder).eval()
spread = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
ids = torch.randint(1, 200, (1, 30), generator=torch.Generator().manual_seed(0))
settings = dict(max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
expected = plain.generate(ids, **settings)
with PrefixStore(f"{folder}/store", block_size=8) as store, TieredCache(store) as cache:
    for _ in range(2):
        found = spread.generate(ids, past_key_values=cache, **settings)
        print(rank, torch.equal(found, expected), cache.layers[0].keys.shape[1], cache.last_turn.cached_tokens,
              cache.last_turn.miss_reason, flush=True)
dist.destroy_process_group()
"""


@pytest.mark.sample(2, of="new processes")
@pytest.mark.slow
def test_tensor_parallel_ranks_reuse_nothing(make_model, tmp_path):
    """Each rank has K and V of other heads, and all ranks must feed the same tokens. So no rank reuses tokens."""
    make_model("llama").save_pretrained(tmp_path)
    world = 2
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(RANK), str(rank), str(world), str(tmp_path)],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outcomes = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (said, errors) in enumerate(outcomes):
        lines = said.splitlines()
        assert len(lines) == 2, errors
        for line in lines:
            assert line.startswith(f"{number} True 1 0 the weights are spread over 2 processes"), line


class Part:
    """A tensor that declares itself a shard, as a DTensor does."""

    def __init__(self, processes, coordinate):
        self.processes, self.coordinate = processes, coordinate


class Spread(torch.Tensor):
    @staticmethod
    def __new__(cls, whole, mesh):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)

    def __init__(self, whole, mesh):
        self.whole, self.device_mesh, self.placements = whole, mesh, ("Shard(dim=0)",)

    def __tensor_flatten__(self):
        return ["whole", "device_mesh"], None

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].device_mesh)
        raise NotImplementedError(function)


class Mesh:
    def __init__(self, shape, coordinate):
        self.shape, self._coordinate = shape, coordinate

    def size(self):
        return int(torch.tensor(self.shape).prod())

    def get_coordinate(self):
        return self._coordinate


def test_mesh_shape_and_rank_of_a_weight_change_the_root(model):
    projection = model.model.layers[0].self_attn.k_proj
    whole, roots = projection.weight.data, set()
    for mesh in (Mesh((1,), (0,)), Mesh((1, 1), (0, 0)), Mesh((1,), (1,))):
        projection.weight = torch.nn.Parameter(Spread(whole, mesh), requires_grad=False)
        identity = identify(model, "", 8)
        assert isinstance(identity, Identity)
        roots.add(identity.root)
    assert len(roots) == 3
    projection.weight = torch.nn.Parameter(Spread(whole, Mesh((2, 2), (0, 1))), requires_grad=False)
    assert "spread over 4 processes" in identify(model, "", 8).reason


def test_tp_size_of_older_transformers_turns_reuse_off(model, monkeypatch):
    """Older versions use plain tensors and set the number of processes on the model."""
    monkeypatch.setattr(type(model), "_tp_size", 2, raising=False)
    assert "spread over 2 processes" in identify(model, "", 8).reason
