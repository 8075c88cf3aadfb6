"""Descriptions differ for values that only look alike, and some values cannot be described."""

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
    """A number type that could compute differently from float."""


class Hidden(deque):
    """A deque whose ``__reduce__`` leaves out its contents."""

    def __reduce__(self):
        return Hidden, ()


@pytest.fixture(scope="module")
def operator():
    """An operator registered by user code."""
    mine = library.Library("kvtier_test", "DEF")
    mine.define("double(Tensor x) -> Tensor")
    mine.impl("double", lambda x: 2 * x, "CPU")
    yield torch.ops.kvtier_test.double
    mine._destroy()


def reads_the_operator(x):
    return torch.ops.kvtier_test.double(x)


def test_float_subclass_is_described_differently_from_a_float():
    assert describe(Half(2.0), "it", []) != describe(2.0, "it", [])


def test_c_container_that_hides_its_contents_is_undescribable():
    with pytest.raises(Undescribable):
        describe(Hidden([1]), "it", [])


def test_user_registered_operators_are_undescribable(operator):
    with pytest.raises(Undescribable, match="kvtier_test"):
        describe(operator.default, "it", [])
    with pytest.raises(Undescribable, match="kvtier_test"):
        describe_code(reads_the_operator)
    assert describe(torch.ops.aten.add.Tensor, "it", [])


def test_values_with_too_many_parts_are_undescribable():
    with pytest.raises(Undescribable):
        describe([(i,) for i in range(50_001)], "it", [])


def test_kvtier_patch_of_prepare_inputs_keeps_the_root():
    model = families.build("mamba2")
    before = identify(model, "", 256).root
    patch_prepare_inputs(model)
    try:
        assert identify(model, "", 256).root == before
    finally:
        restore_classes()
