"""Code is judged by its origin, never by its names."""

from __future__ import annotations

import transformers.activations

from kvtier.hf.identity.code import Origin, behind, is_compiled, origin_of_class, origin_of_function
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
