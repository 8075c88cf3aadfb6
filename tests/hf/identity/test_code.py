"""Code is judged by where it comes from, never by the names that it carries."""

from __future__ import annotations

import transformers.activations

from kvtier.hf.identity.code import Origin, behind, is_compiled, origin_of_class, origin_of_function
from kvtier.hf.identity.stable_repr import describe


def made_in(file, name, source):
    """Return what ``source`` defines, as if it were the file ``file`` of the module ``name``."""
    module = {"__name__": name}
    exec(compile(source, file, "exec"), module)
    return module


def test_code_elsewhere_is_not_released_by_the_name_of_its_module():
    mine = made_in("/home/somebody/mine.py", "torch.mine", "def forward(x):\n    return x\n")["forward"]
    assert origin_of_function(mine) is Origin.OWN
    assert origin_of_function(transformers.activations.get_activation) is Origin.RELEASED


def test_a_class_under_the_name_of_a_released_one_is_not_released():
    kind = type("Linear", (), {"__module__": "torch.nn.modules.linear", "factor": 2})
    assert kind.__qualname__ == "Linear"
    assert origin_of_class(kind) is Origin.OWN


def test_only_what_torch_compile_made_is_followed(monkeypatch):
    """An attribute that it sets may be set by others, too."""
    other = made_in("/home/somebody/mine.py", "mine", "def forward(x):\n    return x\n")["forward"]
    released = transformers.activations.get_activation
    monkeypatch.setitem(released.__dict__, "_torchdynamo_orig_callable", other)
    assert not is_compiled(released)
    assert behind(released) is released


def test_the_bases_of_a_class_of_ones_own_count():
    def child(factor):
        return made_in(
            "/home/somebody/mine.py",
            "mine",
            f"class Base:\n    factor = {factor}\n\n\nclass Child(Base):\n    pass\n",
        )["Child"]

    assert describe(child(2), "it", []) == describe(child(2), "it", [])
    assert describe(child(2), "it", []) != describe(child(3), "it", [])
