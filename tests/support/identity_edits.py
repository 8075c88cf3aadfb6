"""Values and edits that decide K and V, each in two variants, for this process and for others."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import json
import pathlib
import sys
import threading
import types
import uuid
import weakref

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers import masking_utils as masks
from transformers.integrations import sdpa_attention
from transformers.models.llama import modeling_llama as llama

from kvtier.hf.identity.fingerprint import Identity, identify


def small():
    """A new tiny Llama, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


def say(model):
    """Return the root, or the reason why there is no root."""
    identity = identify(model, "", 8)
    return identity.root if isinstance(identity, Identity) else f"off: {identity.reason}"


# --- values that the code of a model reads ----------------------------------------------------------------------------


class Float(float):
    pass


class Text(str):
    pass


class List(list):
    pass


class Queue(collections.deque):
    pass


class Plain:
    def __init__(self, n):
        self._n = n


class Silent(Plain):
    def __getstate__(self):
        return {}

    def __reduce__(self):
        return (Silent, (0,))


class Calls(Plain):
    def __call__(self, x):
        return x * self._n


class Slots:
    __slots__ = ("__n",)

    def __init__(self, n):
        self.__n = n


@dataclasses.dataclass(slots=True)
class SlottedData:
    n: int


@dataclasses.dataclass(frozen=True)
class FrozenData:
    n: int
    more: tuple = ()


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Flags(enum.Flag):
    A = 1
    B = 2


class Static:
    held = 0


Pair = collections.namedtuple("Pair", "a b")


def scale(x, n=1, *, factor=1):
    return x * n * factor


def with_default(n):
    def inner(x, by=n):
        return x * by

    return inner


def with_keyword(n):
    def inner(x, *, by=n):
        return x * by

    return inner


def with_cell(n):
    return lambda x: x * n


def with_list_in_cell(n):
    numbers = [1, [n]]
    return lambda x: x * numbers[1][0]


def with_attribute(n):
    def inner(x):
        return x * inner.n

    inner.n = n
    return inner


def calling(n):
    one, two = (lambda x: x + 1), (lambda x: x + 2)
    chosen = (one, two)[n - 1]
    return lambda x: chosen(x)


def class_with(n):
    return type("Made", (), {"n": n, "get": with_cell(n)})


def dispatched(n):
    @functools.singledispatch
    def inner(x):
        return x * n

    return inner


def own_ufunc(n):
    return np.frompyfunc(with_cell(n), 1, 1)


def deep(n):
    value = n
    for _ in range(30):
        value = [value, {"k": (value,)}] if isinstance(value, int) else [value]
    return value


def looped(n):
    loop = [n]
    loop.append({"again": loop})
    return loop


def generator(n):
    return (i * n for i in range(3))


def held_by_class(n):
    Static.held = n
    return Static


# The result of each entry differs between 1 and 2. Entries in OFF have no stable representation.
VALUES = {
    "int": lambda n: n,
    "bool": lambda n: n == 1,
    "float": lambda n: n / 7,
    "zeros": lambda n: 0.0 if n == 1 else -0.0,
    "int or float": lambda n: 1 if n == 1 else 1.0,
    "int or bool": lambda n: 1 if n == 1 else True,
    "text or bytes": lambda n: "1" if n == 1 else b"1",
    "complex": lambda n: complex(0, n),
    "np.float32": lambda n: np.float32(n),
    "np.float64": lambda n: 1 / np.sqrt(n + 1),
    "np types": lambda n: np.float32(1) if n == 1 else np.float64(1),
    "np.longdouble": lambda n: np.longdouble(1) / (n + 2),
    "np.str_": lambda n: np.str_(n),
    "np.datetime64": lambda n: np.datetime64(f"2020-01-0{n}"),
    "np array": lambda n: np.array([1, n]),
    "np array shape": lambda n: np.ones((1, 2) if n == 1 else (2, 1)),
    "np array dtype": lambda n: np.zeros(1, np.int32 if n == 1 else np.float32),
    "np array of objects": lambda n: np.array([{"n": n}, None], dtype=object),
    "np structured": lambda n: np.array([(1, n)], dtype=[("a", "i1"), ("b", "i8")]),
    "np.dtype": lambda n: np.dtype(f"i{4 * n}"),
    "np ufunc": lambda n: (np.sin, np.cos)[n - 1],
    "float subclass": lambda n: Float(n),
    "str subclass": lambda n: Text(n),
    "Decimal": lambda n: decimal.Decimal(n) / 7,
    "Fraction": lambda n: fractions.Fraction(n, 7),
    "range": lambda n: range(n),
    "slice": lambda n: slice(n),
    "bytearray": lambda n: bytearray([n]),
    "memoryview": lambda n: memoryview(bytes([n])),
    "array": lambda n: array.array("i", [n]),
    "list": lambda n: [n],
    "list or tuple": lambda n: [1] if n == 1 else (1,),
    "list subclass": lambda n: List([n]),
    "tuple": lambda n: (n, ("a", n)),
    "namedtuple": lambda n: Pair(1, n),
    "dict": lambda n: {"a": {"b": [n]}},
    "dict keys": lambda n: {n: 1, "a": None, None: (2,)},
    "dict views": lambda n: types.MappingProxyType({"a": n}),
    "OrderedDict": lambda n: collections.OrderedDict([("a", 1), ("b", 1)][:: 1 if n == 1 else -1]),
    "defaultdict": lambda n: collections.defaultdict(int, a=n),
    "default of a defaultdict": lambda n: collections.defaultdict(int if n == 1 else float),
    "Counter": lambda n: collections.Counter("a" * n),
    "UserDict": lambda n: collections.UserDict(a=n),
    "deque": lambda n: collections.deque([n], 3),
    "deque subclass": lambda n: Queue([n]),
    "set": lambda n: {"a", "b", "c", "d", str(n)},
    "frozenset": lambda n: frozenset({"a", "b", "c", "d", str(n)}),
    "set of tuples": lambda n: {("a", 1), ("b", 2), ("c", n)},
    "datetime": lambda n: datetime.datetime(2020, 1, n, tzinfo=datetime.timezone.utc),
    "Path": lambda n: pathlib.Path(f"/a/{n}"),
    "UUID": lambda n: uuid.UUID(int=n),
    "object": Plain,
    "object that hides its state": Silent,
    "object with slots": Slots,
    "object that is called": Calls,
    "method": lambda n: Calls(n).__call__,
    "method of a builtin": lambda n: [n].count,
    "dataclass with slots": SlottedData,
    "frozen dataclass": lambda n: FrozenData(1, (Plain(n),)),
    "namespace": lambda n: types.SimpleNamespace(n=n),
    "enum": lambda n: Colour(n),
    "flag": lambda n: Flags.A if n == 1 else Flags.A | Flags.B,
    "weak reference": lambda n: weakref.ref((Plain, Static)[n - 1]),
    "class": lambda n: (Plain, Slots)[n - 1],
    "class made here": class_with,
    "attribute of a class": held_by_class,
    "object of a class made here": lambda n: class_with(n)(),
    "torch.dtype": lambda n: (torch.float32, torch.float64)[n - 1],
    "torch.Size": lambda n: torch.Size([n]),
    "tensor": lambda n: torch.tensor(float(n)),
    "tensor in a list": lambda n: [{"a": torch.tensor(float(n))}],
    "tensor in a cell": lambda n: with_cell(torch.tensor(float(n))),
    "module in a list": lambda n: [nn.ReLU6().eval() if n == 1 else nn.ReLU().eval()],
    "torch function": lambda n: (torch.relu, torch.tanh)[n - 1],
    "torch operator": lambda n: (torch.ops.aten.relu, torch.ops.aten.tanh)[n - 1],
    "builtin": lambda n: (len, abs)[n - 1],
    "partial": lambda n: functools.partial(scale, n=n),
    "partial by position": lambda n: functools.partial(scale, n),
    "lambda": lambda n: (lambda x: x + 1) if n == 1 else (lambda x: x + 2),
    "default": with_default,
    "keyword default": with_keyword,
    "cell": with_cell,
    "list in a cell": with_list_in_cell,
    "attribute of a function": with_attribute,
    "function in a cell": calling,
    "nested function": lambda n: (lambda: lambda x: x + 1) if n == 1 else (lambda: lambda x: x + 2),
    "cached function": lambda n: functools.lru_cache(with_cell(n)),
    "property": lambda n: property(with_cell(n)),
    "code": lambda n: compile(f"{n}", "a", "eval"),
    "wrapped": lambda n: functools.wraps(llama.LlamaMLP.forward)(with_cell(n)),
    "deeply nested": deep,
    "refers to itself": looped,
    "singledispatch": dispatched,
    "own ufunc": own_ufunc,
    "generator": generator,
    "lock": lambda n: threading.Lock(),
    "masked array": lambda n: np.ma.array([n]),
    "own module": lambda n: sys.modules[__name__],
}
OFF = {"own ufunc", "generator", "lock", "masked array", "own module"}
# Values that are equal in both variants are listed because they turn reuse off.


@contextlib.contextmanager
def value_set(name, n):
    """A model whose code reads the value ``name``."""
    model = small()
    model.model.layers[0].self_attn.scaling = VALUES[name](n)
    yield model


# --- edits of code ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def put(owner, name, value):
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


def posing(function, n):
    """A function of ours that carries the name of ``function``."""

    @functools.wraps(function)
    def ours(*args, **kwargs):
        return function(*args, **kwargs) * n

    return ours


def posing_by_hand(function, n):
    """The same without ``__wrapped__``, under every name that can be set."""
    ours = posing(function, n)
    del ours.__wrapped__
    ours.__module__, ours.__qualname__, ours.__name__ = function.__module__, function.__qualname__, function.__name__
    return ours


FACTOR, TABLE, MODULE = 1, {"a": [1]}, types.ModuleType("ours")


def reading_globals(self, x):
    return self.down_proj(self.up_proj(x)) * FACTOR


def reading_containers(self, x):
    return self.down_proj(self.up_proj(x)) * TABLE["a"][0]


def reading_module(self, x):
    return self.down_proj(self.up_proj(x)) * MODULE.inside.factor


def helper(x):
    return x * FACTOR


def calling_helper(self, x):
    return helper(self.down_proj(x))


@contextlib.contextmanager
def global_read(function, n):
    MODULE.inside = types.ModuleType("inside")
    MODULE.inside.factor = n
    TABLE["a"][0] = n
    with put(sys.modules[__name__], "FACTOR", n), put(llama.LlamaMLP, "forward", function):
        yield


@contextlib.contextmanager
def in_place(n):
    """The same function object with other code."""
    function, before = llama.LlamaMLP.forward, llama.LlamaMLP.forward.__code__
    if n == 2:
        function.__code__ = reading_globals.__code__.replace(co_freevars=before.co_freevars)
    try:
        yield
    finally:
        function.__code__ = before


@contextlib.contextmanager
def in_the_name_of_transformers(n):
    """Code compiled in the namespace of a released module, as patching libraries do."""
    namespace = {}
    exec(f"def rotate_half(x): return x * {n}", vars(llama), namespace)
    before = llama.rotate_half
    with put(llama, "rotate_half", namespace["rotate_half"]):
        yield
    assert llama.rotate_half is before


CLASS_EDITS = {
    "forward of a class": lambda n: put(llama.LlamaMLP, "forward", with_cell(n)),
    "posing forward of a class": lambda n: put(llama.LlamaMLP, "forward", posing(llama.LlamaMLP.forward, n)),
    "forward that poses by hand": lambda n: put(llama.LlamaMLP, "forward", posing_by_hand(llama.LlamaMLP.forward, n)),
    "no_grad around a posing forward": lambda n: put(
        llama.LlamaMLP, "forward", torch.no_grad()(posing(llama.LlamaMLP.forward, n))
    ),
    "partialmethod": lambda n: put(llama.LlamaMLP, "forward", functools.partialmethod(scale, n)),
    "property of a class": lambda n: put(llama.LlamaAttention, "ratio", property(with_cell(n))),
    "attribute of a class": lambda n: put(llama.LlamaAttention, "scaling_of_class", n),
    "list of a class": lambda n: put(llama.LlamaAttention, "numbers", [n]),
    "forward of another released class": lambda n: put(
        llama.LlamaMLP, "forward", (llama.LlamaMLP.forward, llama.LlamaRMSNorm.forward)[n - 1]
    ),
    "forward of torch's class": lambda n: put(nn.Linear, "forward", posing(nn.Linear.forward, n)),
    "call of every module": lambda n: put(nn.Module, "__call__", posing(nn.Module.__call__, n)),
    "another method of a class": lambda n: put(llama.LlamaRMSNorm, "scale_up", with_cell(n)),
    "code in place": in_place,
    "global that a forward reads": lambda n: global_read(reading_globals, n),
    "container that a forward reads": lambda n: global_read(reading_containers, n),
    "module that a forward reads": lambda n: global_read(reading_module, n),
    "function that a forward calls": lambda n: global_read(calling_helper, n),
    "function of a released module": lambda n: put(
        llama, "apply_rotary_pos_emb", posing(llama.apply_rotary_pos_emb, n)
    ),
    "function of a released module, by exec": in_the_name_of_transformers,
    "released function in place of another": lambda n: put(
        llama, "rotate_half", (llama.rotate_half, llama.repeat_kv)[n - 1]
    ),
    "class of a released module": lambda n: put(
        llama, "LlamaRMSNorm", type("LlamaRMSNorm", (llama.LlamaRMSNorm,), {"n": n})
    ),
    "constant of a released module": lambda n: put(llama, "SCALE", n),
    "table of a released module": lambda n: put(llama, "TABLE", {"a": n}),
    "function that attention calls": lambda n: put(sdpa_attention, "repeat_kv", posing(sdpa_attention.repeat_kv, n)),
    "function that masks call": lambda n: put(masks, "and_masks", posing(masks.and_masks, n)),
    "function of torch": lambda n: put(torch, "matmul", posing(torch.matmul, n)),
    "function of torch.nn.functional": lambda n: put(functional, "linear", with_cell(n)),
    "another function of torch.nn.functional": lambda n: put(
        functional, "silu", (functional.silu, functional.gelu)[n - 1]
    ),
    "method of tensors": lambda n: put(torch.Tensor, "__matmul__", with_cell(n)),
}


@contextlib.contextmanager
def class_edited(name, n):
    """A model whose code was edited for a class or everywhere."""
    with CLASS_EDITS[name](n):
        yield small()


# --- edits of one model -----------------------------------------------------------------------------------------------


def hook_posing(function, n):
    return posing(function, n)


def from_transformers():
    """A function of transformers whose name an edit takes."""
    return llama.eager_attention_forward


class OwnModule(nn.Module):
    def __init__(self, n):
        super().__init__()
        self._hidden, self.held = n, [Plain(n)]

    def forward(self, x):
        return x * self._hidden


def own_class(model, n):
    class Own(llama.LlamaMLP):
        __module__, __qualname__ = llama.LlamaMLP.__module__, llama.LlamaMLP.__qualname__

        def forward(self, x):
            return super().forward(x) * n

    model.model.layers[0].mlp.__class__ = Own


def own_class_attribute(model, n):
    class Own(llama.LlamaMLP):
        factor = n

    model.model.layers[0].mlp.__class__ = Own


def registered(model, n):
    AttentionInterface.register("posing", posing(llama.eager_attention_forward, n))
    model.config._attn_implementation = "posing"


def own_config_value(model, n):
    model.config.ours = Plain([n, {1: 2, "a": None}])


def unread_name_read_by_own_code(model, n):
    model.model.layers[0].mlp.mine = n
    model.own = OwnModule(1).eval()
    model.own.look = lambda module: module.mine


def unread_name_read_by_dynamic_code(model, n):
    model.model.layers[0].mlp.mine = n
    model.own = OwnModule(1).eval()
    model.own.look = lambda module, name: getattr(module, "mi" + name)


def trusted_hook(model, n):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.utils.spectral_norm(model.lm_head, n_power_iterations=n)


MODEL_EDITS = {
    "own module": lambda model, n: setattr(model, "own", OwnModule(n).eval()),
    "own class that poses": own_class,
    "attribute of an own class": own_class_attribute,
    "registered attention that poses": registered,
    "own value in the config": own_config_value,
    "keys of all kinds in the config": lambda model, n: setattr(model.config, "ours", {1: n, "a": 2, None: (3,)}),
    "lock in the config": lambda model, n: setattr(model.config, "ours", {"lock": threading.Lock()}),
    "attribute that own code reads": unread_name_read_by_own_code,
    "attribute that own code may read": unread_name_read_by_dynamic_code,
    "weights that a hook computes": trusted_hook,
    "forward of one module that poses": lambda model, n: setattr(
        model.model.layers[0].mlp, "forward", posing(model.model.layers[0].mlp.forward, n)
    ),
    "hook that poses": lambda model, n: model.lm_head.register_forward_hook(posing(from_transformers(), n)),
    "hook in a wrapper of torch": lambda model, n: model.lm_head.register_forward_pre_hook(
        torch.no_grad()(posing(from_transformers(), n))
    ),
    "hook that is a partial": lambda model, n: model.lm_head.register_forward_hook(functools.partial(scale, n=n)),
    "hook with a wrapper of transformers": lambda model, n: model.lm_head.register_forward_hook(
        functools.partial(from_transformers(), posing(from_transformers(), n))
    ),
}
MODEL_OFF = {
    "lock in the config",
    "forward of one module that poses",
    "hook that poses",
    "hook in a wrapper of torch",
    "hook that is a partial",
    "hook with a wrapper of transformers",
}


@contextlib.contextmanager
def model_edited(name, n):
    """A model that was edited itself."""
    model = small()
    MODEL_EDITS[name](model, n)
    try:
        yield model
    finally:
        AttentionInterface._global_mapping.pop("posing", None)


TABLES = (
    (VALUES, OFF, value_set),
    (CLASS_EDITS, frozenset(), class_edited),
    (MODEL_EDITS, MODEL_OFF, model_edited),
)


def say_all():
    """Return the root or reason for the first variant of everything."""
    said = {"nothing": say(small())}
    for number, (table, _, make) in enumerate(TABLES):
        for name in table:
            with make(name, 1) as model:
                said[f"{number} {name}"] = say(model)
    return said


def main():
    """Write the result of ``say_all`` as JSON."""
    print(json.dumps(say_all()))
