"""Block files hold K and V of any shape and dtype bitwise, and damaged files never return wrong values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvtier.errors import BlockError
from kvtier.kv.codecs import BUILT_IN
from kvtier.kv.page import Page
from kvtier.kv.spec import KVSpec
from kvtier.store.block import Block
from kvtier.store.chain import BlockId
from kvtier.store.format.block_file import BlockFile, encode_block
from tests.support.stores import OTHER_ROOT, ROOT, ids, same_bits

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
# Exponents of all ones are infinities, and NaNs with payloads; a lone sign bit is -0.0.
SPECIAL = {
    torch.float64: [0x7FF0000000000000, 0xFFF0000000000000, 0x7FF0000000000001, 0xFFFFFFFFFFFFFFFF, 1 << 63, 1],
    torch.float32: [0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 1 << 31, 1],
    torch.float16: [0x7C00, 0xFC00, 0x7C01, 0xFFFF, 1 << 15, 1],
    torch.bfloat16: [0x7F80, 0xFF80, 0x7F81, 0xFFFF, 1 << 15, 1],
    torch.float8_e4m3fn: [0x7F, 0xFF, 0x7E, 0xFE, 0x80, 1],
    torch.float8_e5m2: [0x7C, 0xFC, 0x7D, 0xFF, 0x80, 1],
}
codecs = st.sampled_from(list(BUILT_IN.values()))


@st.composite
def tensors(draw, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw any bits, often special values, as a contiguous tensor or a view with other strides."""
    words = st.one_of(st.sampled_from(SPECIAL[dtype]), st.integers(0, 2 ** (8 * dtype.itemsize) - 1))
    count = math.prod(shape)
    drawn = draw(st.lists(words, min_size=min(count, 1), max_size=min(count, 12)))
    filled = [drawn[i % len(drawn)] for i in range(count)] if count else []
    data = bytearray(b"".join(word.to_bytes(dtype.itemsize, "little") for word in filled))
    flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if count else torch.empty(0, dtype=dtype)
    if draw(st.booleans()):
        return flat.view(shape[::-1]).permute(*reversed(range(len(shape))))
    return flat.view(shape)


@st.composite
def blocks(draw) -> Block:
    """Layers may differ in heads, head sizes and dtypes; K may differ from V; a size may be zero."""
    count = draw(st.integers(1, 5))
    tokens = draw(st.lists(st.integers(0, 2**63 - 1), min_size=count, max_size=count))
    sizes = st.integers(0, 3)
    pages = []
    for _ in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(DTYPES))
        k, v = (draw(tensors(dtype, (draw(sizes), count, draw(sizes)))) for _ in "kv")
        pages.append(Page(k, v))
    parent = draw(st.sampled_from([ROOT, OTHER_ROOT]))
    return Block(BlockId.of(ROOT, parent, ids(*tokens)), tuple(pages))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("blocks") / "block.safetensors"


def assert_equal(page: Page, original: Page) -> None:
    assert same_bits(page.k_htd, original.k_htd)
    assert same_bits(page.v_htd, original.v_htd)


@given(st.data(), st.sampled_from(DTYPES), codecs)
def test_codec_round_trip_of_any_tensor_is_bitwise(data, dtype, codec):
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 3)))
    original = data.draw(tensors(dtype, shape))
    assert same_bits(codec.decode(codec.encode(original).copy(), shape, dtype), original)


@given(blocks(), codecs)
def test_block_file_round_trip_is_bitwise(path, original, codec):
    path.write_bytes(b"".join(encode_block(original, codec)))
    file = BlockFile(str(path))
    try:
        assert (file.id.key, file.id.parent, file.id.root) == (original.id.key, original.id.parent, original.id.root)
        assert file.id.tokens.tolist() == original.id.tokens.tolist()
        assert file.spec == KVSpec(tuple(p.spec for p in original.pages))
        for layer, page in enumerate(original.pages):
            assert_equal(file.page(layer), page)
    finally:
        file.close()


@given(st.data(), blocks(), codecs)
def test_damaged_block_file_never_returns_wrong_values(path, data, original, codec):
    whole = b"".join(encode_block(original, codec))
    damaged = bytearray(whole)
    kind = data.draw(st.sampled_from(["flips", "cut", "grown", "swapped", "zeroed"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flips":
        for place, bit in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 7)), min_size=1)):
            damaged[place] ^= 1 << bit
    elif kind == "cut":
        del damaged[at:]
    elif kind == "grown":
        damaged[at:at] = data.draw(st.binary(min_size=1, max_size=64))
    elif kind == "swapped":
        damaged[at], damaged[other] = damaged[other], damaged[at]
    else:  # a sector of the drive that was never written
        damaged[at : at + 512] = bytes(len(damaged[at : at + 512]))
    assume(damaged != whole)
    path.write_bytes(damaged)
    try:
        file = BlockFile(str(path))
    except BlockError:
        return
    try:
        assert file.id.key == original.id.key
        assert file.id.tokens.tolist() == original.id.tokens.tolist()
        for layer, page in enumerate(original.pages):
            try:
                read = file.page(layer)
            except BlockError:
                continue
            assert_equal(read, page)
    finally:
        file.close()


@given(st.data(), blocks(), codecs)
def test_damage_after_the_header_is_always_refused(path, data, original, codec):
    """Every bit after the header is checked: opening or reading the file fails."""
    whole = bytearray(b"".join(encode_block(original, codec)))
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    assert header_bytes < len(whole)  # the token ids follow the header, even without K and V
    whole[data.draw(st.integers(header_bytes, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    with pytest.raises(BlockError):  # noqa: PT012  opening or reading fails, depending on the damaged byte
        file = BlockFile(str(path))
        try:
            for layer in range(len(original.pages)):
                file.page(layer)
        finally:
            file.close()
