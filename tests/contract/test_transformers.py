"""Upstream has every name and signature that kvtier relies on, and no new ones that kvtier must handle."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from reliance import (
    IMPORTS,
    KNOWN_MEMBERS,
    LAYER_TYPES,
    MEMBERS,
    NOT_KEPT,
    OTHERS,
    ROPE_TYPES,
    ROPE_TYPES_BY_LENGTH,
    SETTINGS,
    STATES,
)
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, cache_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import kvtier
import kvtier.hf
from kvtier.hf.compat.names import POSITIONAL
from kvtier.hf.identity.eligibility import _lengths
from kvtier.hf.layers.build import _KINDS, _NAMED_KINDS
from kvtier.hf.layers.states import _LINEAR, _WHOLE

PACKAGE = Path(kvtier.__file__).parent
UPSTREAM = ("transformers", "accelerate", "peft")


def changed(name, now, where):
    """The message of a failing test."""
    package = next((one for one in ("accelerate", "peft") if one in name.lower()), "transformers")
    return f"{name} {now} in {package} {version(package)}: kvtier/{where} must know"


def find(path):
    """Return the object at ``path``; a member as its class defines it."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = inspect.getattr_static(found, part) if isinstance(found, type) else getattr(found, part)
        return found
    raise AttributeError(path)


def shape_of(found):
    if isinstance(found, property):
        return "property"
    signature = inspect.signature(inspect.unwrap(found))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


@pytest.mark.parametrize("reliance", [*IMPORTS, *MEMBERS, *OTHERS], ids=lambda reliance: reliance.name)
def test_upstream_name_exists_with_the_expected_signature(reliance):
    if not reliance.holds_here:
        pytest.skip(f"from {reliance.since} until {reliance.until}")
    if reliance.name.startswith("peft."):
        pytest.importorskip("peft")
    try:
        found = find(reliance.name)
    except AttributeError:
        pytest.fail(changed(reliance.name, "is gone", reliance.where))
    if reliance.shape is not None and shape_of(found) != reliance.shape:
        pytest.fail(changed(f"{reliance.name}{reliance.shape}", f"is now {shape_of(found)}", reliance.where))


@pytest.mark.parametrize("reliance", [*IMPORTS, *MEMBERS, *OTHERS], ids=lambda reliance: reliance.name)
def test_upstream_name_is_still_used_by_kvtier(reliance):
    """An entry that kvtier no longer needs would only delay an update."""
    file = PACKAGE / reliance.where
    assert file.exists(), f"{reliance.name}: there is no kvtier/{reliance.where}"
    owner, name = reliance.name.split(".")[-2:]
    name = owner if name == "__init__" else name
    text = file.read_text()
    if reliance in OTHERS and name[0].isupper():
        return  # kvtier reads its attributes, see below
    assert name in text, f"kvtier/{reliance.where} no longer says {name}: take {reliance.name} out of the contract"


def test_files_named_in_failure_messages_exist():
    """A failure message must not point to a missing file or name."""
    named = set()
    for file in Path(__file__).parent.glob("*.py"):
        named |= set(re.findall(r'"(hf/[\w/]+\.py)(?:: (\w+))?"', file.read_text()))
    assert len(named) > 15
    for file, name in named:
        assert (PACKAGE / file).exists(), file
        assert name in (PACKAGE / file).read_text(), f"{file}: {name}"


def imported_names():
    """Every name that the package imports from upstream, with the importing file."""
    for file in sorted(PACKAGE.rglob("*.py")):
        where = file.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from ((name, where) for name in names if name.split(".")[0] in UPSTREAM)


def test_every_upstream_import_is_in_the_contract_and_in_hf_or_cli():
    known = {reliance.name for reliance in IMPORTS}
    found = list(imported_names())
    assert len(found) > 20  # the search works
    for name, where in found:
        assert where.startswith(("hf/", "cli/")), f"kvtier/{where} imports {name}: only hf and the command line may"
        assert name in known or name == "transformers", (
            f"kvtier/{where} imports {name}, which the contract does not name"
        )


# --- replacements of upstream classes handle every member -------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN_MEMBERS)
def test_upstream_classes_have_no_unknown_public_members(name):
    kind, known = find(name), set()
    for parent in KNOWN_MEMBERS:
        if issubclass(kind, find(parent)):
            known |= set(KNOWN_MEMBERS[parent])
    for member in dir(kind):
        if not member.startswith("_"):
            assert member in known, changed(
                f"{name}.{member}", "is new", KNOWN_MEMBERS[name].get("update", "hf/layers/attention.py")
            )


def stand_ins():
    """Each class in kvtier.hf that replaces an upstream class, with that class."""
    for module in pkgutil.iter_modules(kvtier.hf.__path__):
        for kind in vars(importlib.import_module(f"kvtier.hf.{module.name}")).values():
            if isinstance(kind, type) and kind.__module__ == f"kvtier.hf.{module.name}":
                for parent in kind.__mro__:
                    if parent.__module__.split(".")[0] in UPSTREAM:
                        yield kind, parent


@pytest.mark.parametrize(("kind", "parent"), list(stand_ins()), ids=lambda kind: kind.__qualname__)
def test_overridden_methods_take_what_upstream_passes(kind, parent):
    for name, theirs in vars(parent).items():
        ours = inspect.getattr_static(kind, name, None)
        if name == "__init__" or not inspect.isfunction(theirs) or ours is theirs or not inspect.isfunction(ours):
            continue
        if not str(ours.__module__).startswith("kvtier."):
            continue
        parameters = inspect.signature(ours).parameters.values()
        names = {p.name for p in parameters}
        kinds = {p.kind for p in parameters}
        for parameter in inspect.signature(theirs).parameters.values():
            taken = (
                parameter.name in names
                or parameter.kind in kinds
                or {
                    parameter.VAR_KEYWORD,
                    parameter.VAR_POSITIONAL,
                }
                <= kinds
            )
            assert taken, changed(
                f"{parent.__name__}.{name}({parameter.name})", "is passed", f"{ours.__module__.split('.', 1)[1]}"
            )


def test_layers_have_no_unknown_abstract_methods():
    where = "hf/layers/attention.py"
    known = {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"}
    known |= {"get_max_cache_shape"}  # until 5.20
    for name in sorted(cache_utils.CacheLayerMixin.__abstractmethods__):
        assert name in known, changed(f"CacheLayerMixin.{name}", "is a new abstract method", where)


# --- names that kvtier distinguishes ----------------------------------------------------------------------------------


def register_all_layer_types():
    """Import the models that register their own layer types: registration happens on import."""
    models = Path(transformers.__file__).parent / "models"
    for file in sorted(models.glob("*/modeling_*.py")):
        if "_layer_type = " in file.read_text(encoding="utf-8"):
            importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")


def test_transformers_has_no_unknown_layer_type():
    register_all_layer_types()
    for name in sorted(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING):
        assert name in LAYER_TYPES, changed(f'the layer type "{name}"', "is new", "hf/layers/attention.py")


def test_transformers_has_no_unknown_rope_type():
    for name in sorted(ROPE_INIT_FUNCTIONS):
        assert name in ROPE_TYPES, changed(f'the rope type "{name}"', "is new", "hf/identity/eligibility.py")
    assert {name for name in ROPE_TYPES if list(_lengths(name))} == ROPE_TYPES_BY_LENGTH


def test_generate_has_no_unknown_setting():
    for name in sorted(vars(GenerationConfig())):
        if not name.startswith("_"):
            assert name in SETTINGS, changed(f"the generation setting {name}", "is new", "hf/inputs/request.py")


ASKED = (
    "use_cache token_healing penalty_alpha dola_layers constraints force_words_ids num_beam_groups prefill_chunk_size "
    "prompt_lookup_num_tokens assistant_early_exit use_mtp max_new_tokens eos_token_id pad_token_id"
)


@pytest.mark.parametrize("name", ASKED.split())
def test_generation_settings_that_kvtier_reads_exist(name):
    """A renamed setting would always read as None."""
    assert hasattr(GenerationConfig(), name), changed(
        f"the generation setting {name}", "is gone", "hf/inputs/request.py"
    )
    assert any(
        f'"{name}"' in (PACKAGE / "hf" / file).read_text() for file in ("inputs/request.py", "generate/request.py")
    )


def test_positional_arguments_of_generate_are_unchanged():
    parameters = inspect.signature(inspect.unwrap(transformers.GenerationMixin.generate)).parameters.values()
    now = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]
    assert now == POSITIONAL, changed("generate()'s order of arguments", f"is {now}", "hf/compat/names.py")


def tiny():
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("attribute", "where"),
    [
        ("config.is_encoder_decoder", "hf/generate/request.py"),
        ("config.rope_parameters", "hf/identity/eligibility.py"),
        ("generation_config", "hf/generate/request.py"),
        ("device", "hf/cache.py"),
        ("model.rotary_emb.rope_type", "hf/identity/eligibility.py"),
    ],
)
def test_model_attributes_that_kvtier_reads_exist(attribute, where):
    value = tiny()
    for part in attribute.split("."):
        assert hasattr(value, part), changed(f"{attribute} of a model", "is gone", where)
        value = getattr(value, part)
    assert attribute.split(".")[-1] in (PACKAGE / where).read_text()


def test_cache_attributes_that_kvtier_reads_exist():
    both = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    for name in ("self_attention_cache", "cross_attention_cache", "is_updated"):
        assert hasattr(both, name), changed(f"EncoderDecoderCache.{name}", "is gone", "hf/generate/run.py")
    assert both.is_updated == {}
    layers = transformers.DynamicCache(config=tiny().config).layers
    assert [type(layer) for layer in layers] == [cache_utils.DynamicLayer]
    assert cache_utils.DynamicSlidingWindowLayer(sliding_window=7).sliding_window == 7


def test_linear_attention_layers_have_exactly_the_known_attributes():
    layer = cache_utils.LinearAttentionLayer(number_of_states=2)
    for name in vars(layer):
        assert name in STATES, changed(f"LinearAttentionLayer.{name}", "is new", "hf/layers/states.py")
    for name, is_state in STATES.items():
        assert hasattr(layer, name), changed(f"LinearAttentionLayer.{name}", "is gone", "hf/layers/states.py")
        assert is_state == (name in _LINEAR)
    assert set(layer.conv_states) == set(layer.recurrent_states) == {0, 1}


def test_layer_types_map_to_known_classes():
    """kvtier turns reuse off for every model with a layer of an unknown class."""
    register_all_layer_types()
    # Pure state layers remain transformers' own.
    known = {*_KINDS, cache_utils.LinearAttentionLayer, getattr(cache_utils, "DummyLayer", None)}
    for name, kind in sorted(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.items()):
        if name not in {*_NAMED_KINDS, *_WHOLE, *NOT_KEPT}:
            assert kind in known, changed(
                f"{kind.__name__}, the class of {name} layers,", "is new", "hf/layers/attention.py"
            )


def test_attention_function_registries_behave_like_dicts():
    for registry in (
        transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS,
        transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
    ):
        assert "sdpa" in registry
        assert callable(registry["sdpa"])
        assert "no such function" not in registry


def test_accelerate_hooks_have_the_attributes_that_kvtier_reads():
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module

    linear = torch.nn.Linear(2, 2)
    add_hook_to_module(linear, SequentialHook(ModelHook(), ModelHook()))
    assert "_hf_hook" in vars(linear), changed("_hf_hook of accelerate", "is gone", "hf/identity/module_walk.py")
    assert "_old_forward" in vars(linear), changed(
        "_old_forward of accelerate", "is gone", "hf/identity/eligibility.py"
    )
    assert len(linear._hf_hook.hooks) == 2
    assert hasattr(AlignDevicesHook(), "weights_map")
    model = tiny()
    cpu_offload(model, execution_device="cpu")
    weights = model.model.layers[0].mlp.up_proj._hf_hook.weights_map
    assert hasattr(weights, "prefix"), changed("PrefixedDataset.prefix", "is gone", "hf/identity/module_walk.py")
    assert hasattr(weights, "dataset"), changed("PrefixedDataset.dataset", "is gone", "hf/identity/module_walk.py")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_peft_adapters_have_the_attributes_that_kvtier_reads():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny(), lora, adapter_name="one")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    for name in ("_active_adapter", "_disable_adapters"):
        assert name in vars(layer), changed(
            f"{name} of PEFT's layers", "is no attribute of its own", "hf/identity/module_walk.py"
        )
    assert layer._active_adapter in ("one", ["one"])
    assert layer.scaling["one"] == lora.lora_alpha / lora.r
    assert layer.merged_adapters == []
    assert hasattr(model, "_adapters_disabled"), changed(
        "PeftModel._adapters_disabled", "is gone", "hf/identity/eligibility.py"
    )
    assert not model.active_peft_config.is_prompt_learning
