"""Values that look alike and are not, and values that no words describe."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import library

from kvtier.hf.generate.prefill import patch_prepare_inputs, restore_classes
from kvtier.hf.identity.fingerprint import identify
from kvtier.hf.identity.stable_repr import Undescribable, describe, describe_code
from tests.support import families


class Half(float):
    """A number that computes in its own way."""


class Hidden(deque):
    """Its own code leaves out what it holds."""

    def __reduce__(self):
        return Hidden, ()


@pytest.fixture(scope="module")
def operator():
    """An operator that a program has registered."""
    mine = library.Library("kvtier_test", "DEF")
    mine.define("double(Tensor x) -> Tensor")
    mine.impl("double", lambda x: 2 * x, "CPU")
    yield torch.ops.kvtier_test.double
    mine._destroy()


def reads_the_operator(x):
    return torch.ops.kvtier_test.double(x)


def test_a_number_of_another_class_is_another_number():
    assert describe(Half(2.0), "it", []) != describe(2.0, "it", [])


def test_what_an_object_in_c_holds_must_be_told():
    with pytest.raises(Undescribable):
        describe(Hidden([1]), "it", [])


def test_an_operator_of_ones_own_has_no_words(operator):
    with pytest.raises(Undescribable, match="kvtier_test"):
        describe(operator.default, "it", [])
    with pytest.raises(Undescribable, match="kvtier_test"):
        describe_code(reads_the_operator)
    assert describe(torch.ops.aten.add.Tensor, "it", [])


def test_too_many_values_are_not_looked_at():
    with pytest.raises(Undescribable):
        describe([(i,) for i in range(50_001)], "it", [])


def test_a_method_that_kvtier_has_wrapped_is_the_same_method():
    model = families.build("mamba2")
    before = identify(model, "", 256).root
    patch_prepare_inputs(model)
    try:
        assert identify(model, "", 256).root == before
    finally:
        restore_classes()
