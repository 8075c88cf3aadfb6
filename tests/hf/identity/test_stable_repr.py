"""Descriptions differ for values that only look alike, and some values cannot be described."""

from __future__ import annotations

from array import array
from collections import deque
from typing import Generic, TypeVar

import pytest
import torch
from torch import library

from kvtier.hf.generate.prefill import patch_prepare_inputs, restore_classes
from kvtier.hf.identity.fingerprint import identify
from kvtier.hf.identity.stable_repr import Undescribable, describe, describe_code
from tests.support import families


class Half(float):
    """A number type that could compute differently from float."""


class HiddenDeque(deque):
    """A deque whose ``__reduce__`` leaves out its contents. Before Python 3.12, deque is a static type of C."""

    def __reduce__(self):
        return HiddenDeque, ()


class HiddenArray(array):
    """The same for a type that C makes at run time, as it does with more of them in each version of Python."""

    def __reduce_ex__(self, protocol):
        return HiddenArray, ("d",)


class Plain:
    """Only slots, a dict and weak references, in three classes."""

    __slots__ = ("first", "second")

    def __reduce__(self):
        return type(self), ()


class PlainWithDict(Plain, Generic[TypeVar("T")]):
    """Adds a dict."""


class PlainAgain(PlainWithDict):
    """Adds another slot."""

    __slots__ = ("third",)


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


@pytest.mark.parametrize("value", [HiddenDeque([1]), HiddenArray("d", [1.0])], ids=["static", "heap"])
def test_c_container_that_hides_its_contents_is_undescribable(value):
    with pytest.raises(Undescribable):
        describe(value, "it", [])


def test_attributes_and_slots_of_all_classes_are_described():
    value = PlainAgain()
    seen = {describe(value, "it", [])}
    for name in ("first", "second", "third", "other"):
        setattr(value, name, 1)
        seen.add(describe(value, "it", []))
    assert len(seen) == 5


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
