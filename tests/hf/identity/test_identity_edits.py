"""Edits that decide K and V change the root or turn reuse off; other edits do not. All processes find the same root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from kvtier.hf.identity.attribute_reads import join, reads_of_class
from tests.support import identity_edits
from tests.support.identity_edits import TABLES, say, say_all, small

CASES = [
    pytest.param(make, name, name in off, id=f"{number} {name}")
    for number, (table, off, make) in enumerate(TABLES)
    for name in table
]


@pytest.mark.sample(18)  # of 142
@pytest.mark.parametrize(("make", "name", "is_off"), CASES)
def test_values_that_decide_kv_change_the_root_or_turn_reuse_off(make, name, is_off):
    said = []
    for variant in (1, 1, 2, 1):
        with make(name, variant) as model:
            said.append(say(model))
            assert say(model) == said[-1], "a second turn of the same model"
    assert [one.startswith("off: ") for one in said] == [is_off] * 4, said
    if not is_off:
        assert said[0] == said[1] == said[3] != said[2]
    assert say(small()) == say(small())


@pytest.mark.sample(2, of="new processes")
@pytest.mark.parametrize("seed", ["1", "2"])
def test_roots_and_reasons_are_equal_in_every_process(seed):
    """Other processes order sets differently and have other addresses."""
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = "from tests.support import identity_edits; identity_edits.main()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    there, here = json.loads(done.stdout.splitlines()[-1]), say_all()
    assert there.keys() == here.keys()
    assert [name for name in here if here[name] != there[name]] == []


# --- edits that do not affect K and V ---------------------------------------------------------------------------------

HARMLESS = {
    "tokens": lambda model, n: setattr(model, "last_output", torch.tensor([n])),
    "a number": lambda model, n: setattr(model.model.layers[0].mlp, "times_seen_by_us", n),
    "an object": lambda model, n: setattr(model, "notes_of_ours", {"text": [object(), n]}),
    "a lock": lambda model, n: setattr(model, "lock_of_ours", threading.Lock()),
    "a module": lambda model, n: setattr(model, "others_of_ours", [torch.nn.Linear(n, n)]),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_attributes_that_no_code_reads_keep_the_root(name):
    model = small()
    said = {say(model)}
    for variant in (1, 2):
        HARMLESS[name](model, variant)
        said.add(say(model))
    assert len(said) == 1
    assert not said.pop().startswith("off: ")


def recorded_reads(model, ids):
    """Return the plain attributes of its modules that a model reads while it generates."""
    found = set()
    plain = torch.nn.Module.__getattribute__

    def recording(self, name):
        found.add((type(self), name))
        return plain(self, name)

    torch.nn.Module.__getattribute__ = recording
    try:
        model.generate(ids, max_new_tokens=2, do_sample=False)
    finally:
        del torch.nn.Module.__getattribute__
    return found


def test_every_attribute_read_in_generate_is_found_in_the_code(make_model, family):
    """The names found in the model's code cover the attributes that it reads during generate()."""
    model = make_model(family)
    reads = recorded_reads(model, torch.ones(1, 4, dtype=torch.long))
    known = join(reads_of_class(type(module)) for module in model.modules())
    on_modules = {(type(module), key) for module in model.modules() for key in vars(module)}
    looked_at = {key for kind, key in reads & on_modules if key not in vars(torch.nn.Module())}
    assert "config" in looked_at
    assert [key for key in looked_at if not known.may_read(key)] == []


# --- training mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "matters"),
    [
        ("lm_head", False),
        ("model.norm", False),
        ("model.layers", False),
        ("model.layers.0.mlp", False),
        ("model.layers.0.self_attn", True),
        ("model.layers.0.own", True),
        ("model.layers.0.dropout", True),
        ("model", True),
    ],
)
def test_training_mode_turns_reuse_off_only_where_it_affects_kv(where, matters):
    model = small()
    model.model.layers[0].own = identity_edits.OwnModule(1).eval()
    model.model.layers[0].dropout = torch.nn.Dropout(0.5).eval()
    before = say(model)
    model.get_submodule(where).training = True
    assert say(model) == (f"off: {where} is in training mode (call model.eval())" if matters else before)


def test_resized_lm_head_in_training_mode_keeps_reuse_on():
    model = small()
    model.resize_token_embeddings(50)
    assert model.lm_head.training
    assert not say(model).startswith("off: ")


# --- settings of PyTorch ----------------------------------------------------------------------------------------------

BACKENDS = torch.backends
SWITCHES = [
    (BACKENDS, "fp32_precision", "ieee"),
    (BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    (BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    (BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    (BACKENDS.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    (BACKENDS.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    (BACKENDS.cuda.matmul, "allow_fp16_accumulation", True),
    (BACKENDS.cudnn, "deterministic", True),
    (BACKENDS.cudnn, "benchmark", True),
    (BACKENDS.mkldnn, "deterministic", True),
]


@pytest.mark.parametrize(("owner", "name", "value"), SWITCHES, ids=[f"{i} {s[1]}" for i, s in enumerate(SWITCHES)])
def test_pytorch_backend_settings_change_the_root(owner, name, value):
    if not hasattr(owner, name):
        pytest.skip("this version of PyTorch does not have it")
    model = small()
    root, before = say(model), getattr(owner, name)
    setattr(owner, name, value)
    try:
        changed = say(model)
    finally:
        setattr(owner, name, before)
    assert changed != root
    assert not changed.startswith("off: ")
    assert say(model) == root


@pytest.mark.parametrize("switch", ["flash", "mem_efficient", "math", "cudnn"])
def test_disabling_an_sdpa_backend_changes_the_root(switch):
    model, toggle = small(), getattr(torch.backends.cuda, f"enable_{switch}_sdp")
    root = say(model)
    toggle(False)
    try:
        assert say(model) != root
    finally:
        toggle(True)
    assert say(model) == root


# --- errors while a model is identified -------------------------------------------------------------------------------


class Raising:
    def __getattr__(self, name):
        raise OSError("no such thing")

    def __repr__(self):
        raise OSError("no words")


class RaisingConfig:
    def __deepcopy__(self, memo):
        raise OSError("no copy")


def raising_attribute(model):
    model.model.layers[0].self_attn.scaling = Raising()


def raising_config(model):
    model.config.ours = RaisingConfig()


def circular_config(model):
    model.config.ours = {}
    model.config.ours["again"] = model.config.ours


def too_deep(model):
    value = []
    for _ in range(100_000):
        value = [value]
    model.model.layers[0].self_attn.scaling = value


def no_module(model):
    model.model.layers[0].mlp.__dict__.pop("_forward_hooks")


def jit_child(model):
    model.model.layers[0].mlp.act_fn = torch.jit.script(torch.nn.ReLU().eval())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (raising_config, "the model cannot be identified: OSError: no copy"),
        (too_deep, "the model cannot be identified: RecursionError"),
        (no_module, "the model cannot be identified: KeyError"),
        (jit_child, "act_fn (compiled by torch.jit) cannot be read"),
    ],
)
def test_unidentifiable_models_turn_reuse_off_with_a_reason(edit, reason, caplog):
    model = small()
    edit(model)
    with caplog.at_level("DEBUG", "kvtier"):
        assert reason in say(model)
    assert any(record.exc_info for record in caplog.records) == ("cannot be identified" in reason)


@pytest.mark.parametrize("edit", [raising_attribute, circular_config])
def test_raising_attributes_and_circular_configs_are_identified(edit):
    model, twin = small(), small()
    edit(model)
    edit(twin)
    assert say(model) == say(twin) != say(small())


def test_contradictory_precision_settings_do_not_break_generate(make_model, generate, tokens, cache):
    """A turn with a setting that an older setting contradicts. It used to make generate() fail."""
    model, before = make_model("llama"), torch.backends.fp32_precision
    torch.backends.fp32_precision, matmul = "ieee", torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        for cached in (0, 29):
            generate(model, tokens(30), cache)
            assert cache.last_turn.cached_tokens == cached
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision = matmul, before
