"""Memory regions of strided tensors, checked against sets of addresses."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.testing.simulation.regions import Region


@st.composite
def views(draw, memory):
    """Any view of ``memory``, including self-overlapping, repeating and empty views."""
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.float32]))
    typed = memory.view(dtype)
    sizes = draw(st.lists(st.integers(0, 4), max_size=4))
    strides = [draw(st.integers(0, 9)) for _ in sizes]
    span = 1 + sum(stride * max(size - 1, 0) for size, stride in zip(sizes, strides, strict=True))
    if span > len(typed):
        sizes, strides, span = [], [], 1
    offset = draw(st.integers(0, len(typed) - span))
    return typed.as_strided(sizes, strides, offset)


def addresses(view):
    starts = torch.full((), view.data_ptr(), dtype=torch.int64)
    for size, stride in zip(view.shape, view.stride(), strict=True):
        starts = starts[..., None] + torch.arange(size) * stride * view.element_size()
    index = starts.flatten().tolist()
    return {start + byte for start in index for byte in range(view.element_size())}


@given(data=st.data())
def test_regions_overlap_exactly_when_they_share_an_address(data):
    memory = torch.zeros(160, dtype=torch.uint8)
    one, other = data.draw(views(memory)), data.draw(views(memory))
    shared = bool(addresses(one) & addresses(other))
    assert Region.of(one).overlaps(Region.of(other)) == shared
    assert Region.of(other).overlaps(Region.of(one)) == shared


@given(data=st.data())
def test_region_has_exact_bounds_and_overlaps_its_storage(data):
    memory = torch.zeros(160, dtype=torch.uint8)
    view = data.draw(views(memory))
    touched = addresses(view)
    if touched:
        assert Region.of(view).bounds() == (min(touched), max(touched) + 1)
    assert Region.whole(memory.untyped_storage()).overlaps(Region.of(view)) == bool(touched)
