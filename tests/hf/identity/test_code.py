"""Code is judged by its origin, never by its names."""

from __future__ import annotations

import dis
import types

import pytest
import transformers.activations
import transformers.modeling_utils
import transformers.models.llama.modeling_llama

from kvtier.hf.identity.code import (
    CodeFacts,
    Origin,
    behind,
    is_compiled,
    nested,
    origin_of_class,
    origin_of_function,
)
from kvtier.hf.identity.stable_repr import describe


def made_in(file, name, source):
    """Return the globals that ``source`` defines, as if it were the file ``file`` of the module ``name``."""
    module = {"__name__": name}
    exec(compile(source, file, "exec"), module)
    return module


def test_function_outside_torch_is_own_despite_its_module_name():
    mine = made_in("/home/somebody/mine.py", "torch.mine", "def forward(x):\n    return x\n")["forward"]
    assert origin_of_function(mine) is Origin.OWN
    assert origin_of_function(transformers.activations.get_activation) is Origin.RELEASED


def test_class_named_like_a_released_class_is_own():
    kind = type("Linear", (), {"__module__": "torch.nn.modules.linear", "factor": 2})
    assert kind.__qualname__ == "Linear"
    assert origin_of_class(kind) is Origin.OWN


def test_compile_attribute_set_by_others_is_not_followed(monkeypatch):
    """The attribute that torch.compile sets may also be set by other code."""
    other = made_in("/home/somebody/mine.py", "mine", "def forward(x):\n    return x\n")["forward"]
    released = transformers.activations.get_activation
    monkeypatch.setitem(released.__dict__, "_torchdynamo_orig_callable", other)
    assert not is_compiled(released)
    assert behind(released) is released


def test_description_of_an_own_class_includes_its_bases():
    def child(factor):
        return made_in(
            "/home/somebody/mine.py",
            "mine",
            f"class Base:\n    factor = {factor}\n\n\nclass Child(Base):\n    pass\n",
        )["Child"]

    assert describe(child(2), "it", []) == describe(child(2), "it", [])
    assert describe(child(2), "it", []) != describe(child(3), "it", [])


def globals_by_dis(code):
    operations = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
    found = (each for one in nested(code) for each in dis.get_instructions(one))
    return tuple(sorted({each.argval for each in found if each.opname in operations}))


def fragments_by_dis(code):
    found = set()
    for one in nested(code):
        if {"getattr", "setattr", "hasattr", "attrgetter", "__getattribute__"}.isdisjoint(one.co_names):
            continue
        steps = [each for each in dis.get_instructions(one) if each.opname not in ("EXTENDED_ARG", "CACHE")]
        for index, step in enumerate(steps):
            reach = 4 * step.arg if step.opname == "BUILD_STRING" else 4
            if step.opname in ("BUILD_STRING", "BINARY_OP", "BINARY_ADD", "BINARY_MODULO"):
                before = steps[max(0, index - reach) : index]
                found |= {each.argval for each in before if each.opname == "LOAD_CONST"}
    names = (each for each in found if isinstance(each, str) and each.isidentifier())
    return frozenset(each for each in names if len(each.strip("_")) >= 4)


def functions_of(module):
    for value in vars(module).values():
        inside = vars(value).values() if isinstance(value, type) else [value]
        yield from (each for each in inside if isinstance(each, types.FunctionType))


@pytest.mark.parametrize("module", [transformers.models.llama.modeling_llama, transformers.modeling_utils, dis, types])
def test_searched_instructions_say_what_dis_says(module):
    for function in functions_of(module):
        facts = CodeFacts(function.__code__)
        assert facts.globals_read == globals_by_dis(function.__code__), function
        assert facts.fragments == fragments_by_dis(function.__code__), function


def test_arguments_beyond_a_byte_are_read():
    """Names and constants have numbers; from 128 and 256 on, they are spread over several instructions."""
    lines = "".join(f"    a{n}, {n}.5\n" for n in range(70_000))
    source = f"def read(x):\n{lines}    return getattr(x, 'late_' + x.name), getattr(x, f'early_{{x.a}}_piece')\n"
    code = made_in("/home/somebody/mine.py", "mine", source)["read"].__code__
    facts = CodeFacts(code)
    assert {"a0", "a200", "a300", "a69999"} <= set(facts.globals_read)
    assert facts.globals_read == globals_by_dis(code)
    assert facts.fragments == fragments_by_dis(code) == {"late_", "early_", "_piece"}
