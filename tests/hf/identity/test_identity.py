"""The parts of a root: digests of tensors, and text descriptions of everything else."""

from __future__ import annotations

import enum
import functools
import inspect
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationMixin, PreTrainedConfig

from kvtier.hf.compat.names import POSITIONAL
from kvtier.hf.identity.eligibility import why_unsound
from kvtier.hf.identity.fingerprint import Identity, identify
from kvtier.hf.identity.module_walk import ModelWalk
from kvtier.hf.identity.stable_repr import describe, describe_code
from kvtier.hf.inputs.request import why_cold, why_unsound_call
from kvtier.hf.not_reusable import NotReusable

# --- descriptions -----------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


@dataclass
class Point:
    x: int
    inner: object = None


class Thing:
    def __init__(self, size):
        self.size, self._used = size, object()


def scaled(x, factor=2):
    return x * factor


SAME = [
    ({"b", "a"}, {"a", "b"}),
    ({"x": 1, "y": 2}, {"y": 2, "x": 1}),
    (Point(1, Thing(2)), Point(1, Thing(2))),
    (object(), object()),
    (torch.device("cpu"), torch.device("meta")),
    (functools.partial(scaled, 3), functools.partial(scaled, 3)),
]
DIFFERENT = [
    (1, 2),
    (1.0, 1.5),
    (None, False),
    ("1", 1),
    ([1, 2], [2, 1]),
    ({"a": 1}, {"a": 2}),
    ({"a": {"b": [1]}}, {"a": {"b": [2]}}),
    (Point(1), Point(2)),
    (Thing(1), Thing(2)),
    (torch.float16, torch.bfloat16),
    (Point, Thing),
    (torch.relu, torch.tanh),
    (Colour.RED, None),
]


def _kind(value):
    """Return a test id that is the same in every process."""
    return type(value).__name__


@pytest.mark.parametrize(("one", "other"), SAME, ids=_kind)
def test_describe_is_equal_for_equal_values(one, other):
    assert describe(one, "", []) == describe(other, "", [])
    assert "0x" not in describe(one, "", [])


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=_kind)
def test_describe_differs_for_different_values(one, other):
    assert describe(one, "", []) != describe(other, "", [])


def test_describe_ends_on_values_that_contain_themselves():
    loop = []
    loop.append(loop)
    thing = Thing(1)
    thing.size = {"thing": thing}
    assert describe(loop, "", []) == describe(loop, "", [])
    assert "Thing" in describe(thing, "", [])


def test_describe_finds_tensors_inside_values():
    weight, found = torch.ones(2), []
    describe({"meta": [Point(1, weight)]}, "layer", found)
    assert [(path, value is weight) for path, value in found] == [("layer.meta.0.inner", True)]


def function_of(source):
    names = {"__name__": "notebook"}
    exec(textwrap.dedent(source), names)
    return names["f"]


EDITS = [
    "def f(x): return x * 3",
    "def f(x): return x + 2",
    "def f(x): return x.abs()",
    "def f(x, y=1): return x * 2",
    "def f(x, y=2): return x * 2",
    "def f(x): return [i * 2 for i in x]",
    "def f(x): return [i * 3 for i in x]",
    "def f(x): return x in {'a', 'b'}",
    "def f(x): return x in {'a', 'c'}",
]


def test_describe_code_differs_for_each_edit():
    words = [describe_code(function_of(source)) for source in ["def f(x): return x * 2", *EDITS]]
    assert len(set(words)) == len(words)
    assert words == [describe_code(function_of("\n\n" + source)) for source in ["def f(x): return x * 2", *EDITS]]


# --- modules ----------------------------------------------------------------------------------------------------------


class Hiding(torch.nn.Module):
    """Holds a module, a tensor and a loop where named_parameters() does not look."""

    def __init__(self):
        super().__init__()
        self.listed = [torch.nn.Linear(3, 3)]
        self._held = {"table": torch.zeros(3)}
        self.parents = [self]


def test_walk_finds_weights_and_modules_outside_named_parameters():
    walk = ModelWalk(Hiding())
    assert sorted(name for name, _ in walk.tensors) == ["_held.table", "listed.0.bias", "listed.0.weight"]
    assert [part.name for part in walk.parts] == ["", "listed.0"]


@pytest.mark.cpu_only("the test device has no quantised tensors")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_packed_quantised_weights_turn_reuse_off(model):
    """Packed weights lie in script objects that are not parameters."""
    torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)
    unsound = identify(model, "", 8)
    assert isinstance(unsound, NotReusable)
    assert "_packed_params cannot be read" in unsound.reason


def test_compiled_forward_keeps_reuse_on(model):
    model.forward = torch.compile(model.forward, backend="eager")
    assert isinstance(identify(model, "", 8), Identity)


def test_identity_is_stable_and_its_manifest_names_the_model(model, make_model):
    first = identify(model, "mine", 8)
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long))
    assert identify(model, "mine", 8) == first == identify(make_model("llama"), "mine", 8)
    assert identify(model, "mine", 16).root != first.root != identify(model, "yours", 8).root
    assert first.manifest["model"] == "LlamaForCausalLM"
    assert first.manifest["config"]["hidden_size"] == 64


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": DYNAMIC},
        {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default"}}},
        {"rope_parameters": {"type": "longrope"}},
        {"rope_scaling": {"type": "dynamic"}},
        {"use_dynamic_ntk": True},
        {"text_config": PreTrainedConfig(rope_parameters=DYNAMIC)},
    ],
    ids=str,
)
def test_config_with_length_dependent_positions_is_unsound(config):
    module = torch.nn.Module().eval()
    module.config = PreTrainedConfig()
    assert why_unsound(module, ModelWalk(module)) is None
    vars(module.config).update(config)
    unsound = why_unsound(module, ModelWalk(module))
    assert unsound is not None
    assert "depend on the length" in unsound.reason


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", {"full_attention": "dynamic", "sliding": "default"}])
def test_module_with_length_dependent_positions_is_unsound(model, rope_type):
    """The RoPE type of the module counts, whatever the config says."""
    assert isinstance(identify(model, "", 8), Identity)
    model.model.rotary_emb.rope_type = rope_type
    assert "depend on the length" in identify(model, "", 8).reason


IN_ANOTHER_PROCESS = """
import torch, transformers
from kvtier.hf.identity.fingerprint import identify
torch.manual_seed(0)
shape = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
model.model.layers[0].tags = {str(i) for i in range(20)}
class Own(torch.nn.Module):
    def forward(self, x, kind="a"):
        return x if kind in {"a", "b", "c", "d", "e", "f"} else -x
model.own = Own().eval()
print(identify(model, "", 8).root)
"""


@pytest.mark.sample(2, of="new processes")
def test_identity_is_the_same_in_every_process(monkeypatch):
    """Python orders sets of strings differently in every process."""
    with torch.random.fork_rng():
        names = {"__name__": "__main__"}
        exec(IN_ANOTHER_PROCESS.replace("print(", "root = ("), names)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    done = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == names["root"]


@pytest.mark.parametrize("where", ["of the text", "inside"])
def test_config_with_attention_to_later_tokens_is_unsound(where):
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    config = Gemma3TextConfig(**text, **heads, use_bidirectional_attention=where == "of the text")
    model = Gemma3ForCausalLM(config).eval()
    assert (why_unsound(model, ModelWalk(model)) is None) == (where == "inside")
    if where == "inside":
        config.something = Gemma3TextConfig(**text, **heads, use_bidirectional_attention=True)
    assert "later tokens" in why_unsound(model, ModelWalk(model)).reason


# --- arguments of generate() ------------------------------------------------------------------------------------------


def test_positional_argument_names_equal_those_of_generate():
    parameters = inspect.signature(inspect.unwrap(GenerationMixin.generate)).parameters.values()
    assert tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:] == POSITIONAL


@pytest.mark.parametrize(
    ("arguments", "settings", "reason"),
    [
        ({"image_embeds": torch.ones(1, 3)}, {}, "image_embeds"),
        ({"interpolate_pos_encoding": True}, {}, "interpolate_pos_encoding"),
        ({"images": ["a.png"], "position_ids": None}, {}, ": images"),
        ({}, {"token_healing": True}, "token healing"),
    ],
    ids=str,
)
def test_unsound_arguments_of_generate_give_a_reason(arguments, settings, reason):
    unsound = why_unsound_call({"inputs": torch.ones(1, 3), **arguments}, settings.get)
    assert unsound is not None
    assert reason in unsound.reason


@pytest.mark.parametrize(
    "settings",
    [
        {"custom_generate": "someone/something"},
        {"penalty_alpha": 0.6},
        {"dola_layers": "low"},
        {"num_beam_groups": 2},
        {"force_words_ids": [[1]]},
        {"constraints": [1]},
    ],
    ids=str,
)
def test_custom_decoding_settings_are_cold_but_sound(settings):
    assert why_unsound_call({"inputs": torch.ones(1, 3)}, settings.get) is None
    assert "custom generate" in why_cold({"inputs": torch.ones(1, 3)}, settings.get)


def test_harmless_arguments_of_generate_are_sound():
    harmless = {"attention_mask": torch.ones(1, 3), "max_new_tokens": 3, "eos_token_id": torch.tensor([1]), "top_k": 5}
    harmless |= {"streamer": object(), "output_hidden_states": True, "guidance_scale": 2.0, "position_ids": None}
    assert why_unsound_call(harmless, {"num_beam_groups": 1}.get) is None
