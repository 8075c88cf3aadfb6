"""Built-in codecs: bitwise round trips, and refusal of payloads that do not fit the tensor."""

import struct

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import BlockError
from kvtier.kv.codecs import BUILT_IN
from kvtier.kv.codecs.base import as_bytes

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def from_bits(bits: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(bits), dtype=np.uint8)).view(dtype).view(shape)


@st.composite
def tensors(draw):
    """Draw any bits, including NaN payloads, infinities, negative zeros and subnormals."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.tuples(*[st.integers(1, 4)] * 3))
    size = int(np.prod(shape)) * dtype.itemsize
    return from_bits(draw(st.binary(min_size=size, max_size=size)), dtype, shape)


@given(tensors(), st.sampled_from(sorted(BUILT_IN)))
def test_codec_round_trip_is_bitwise(tensor, codec):
    payload = BUILT_IN[codec].encode(tensor).copy()
    back = BUILT_IN[codec].decode(payload, tuple(tensor.shape), tensor.dtype)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert as_bytes(back).tobytes() == as_bytes(tensor).tobytes()


@pytest.mark.parametrize("codec", BUILT_IN)
@pytest.mark.parametrize(
    ("dtype", "special"),
    [
        (torch.float16, [0x7C00, 0xFC00, 0x7E01, 0xFDFF, 0x8000, 0x0001]),
        (torch.bfloat16, [0x7F80, 0xFF80, 0x7FC1, 0xFFBF, 0x8000, 0x0001]),
        (torch.float32, [0x7F800000, 0xFF800000, 0x7FC00001, 0xFFBFFFFF, 0x80000000, 1]),
        (torch.float64, [0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000001, 0xFFF7FFFFFFFFFFFF, 2**63, 1]),
        (torch.float8_e5m2, [0x7C, 0xFC, 0x7D, 0xFF, 0x80, 0x01]),
        (torch.float8_e4m3fn, [0x7F, 0xFF, 0x80, 0x01, 0x7E, 0xFE]),
    ],
)
def test_infinities_nan_payloads_and_negative_zero_survive(codec, dtype, special):
    bits = np.array(special, dtype=WORDS[dtype.itemsize]).tobytes()
    tensor = from_bits(bits, dtype, (1, 6, 1))
    assert as_bytes(BUILT_IN[codec].decode(BUILT_IN[codec].encode(tensor).copy(), (1, 6, 1), dtype)).tobytes() == bits


@pytest.mark.parametrize("codec", BUILT_IN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shortened_payload_is_refused(codec, dtype):
    tensor = from_bits(bytes(range(64)), dtype, (1, 64 // dtype.itemsize, 1))
    payload = BUILT_IN[codec].encode(tensor)
    for n in range(payload.nbytes):
        with pytest.raises(BlockError):
            BUILT_IN[codec].decode(payload[:n].copy(), tuple(tensor.shape), dtype)


@pytest.mark.parametrize("codec", BUILT_IN)
def test_payload_of_another_shape_is_refused(codec):
    payload = BUILT_IN[codec].encode(torch.zeros(2, 3, 4))
    with pytest.raises(BlockError):
        BUILT_IN[codec].decode(payload, (2, 3, 5), torch.float32)
    with pytest.raises(BlockError):
        BUILT_IN[codec].decode(payload, (2, 3, 3), torch.float32)


@pytest.mark.parametrize("codec", BUILT_IN)
def test_codec_round_trip_of_a_strided_view_keeps_its_values(codec):
    tensor = torch.arange(24, dtype=torch.float32).view(2, 3, 4).transpose(0, 2)[:, 1:]
    assert torch.equal(BUILT_IN[codec].decode(BUILT_IN[codec].encode(tensor).copy(), (4, 2, 2), torch.float32), tensor)


def test_zstd_shrinks_bfloat16_tensors_by_more_than_a_quarter():
    tensor = torch.randn(8, 256, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert BUILT_IN["zstd"].encode(tensor).nbytes < 0.75 * tensor.nbytes


def with_frame(frame: bytes, rest: bytes = b"") -> np.ndarray:
    return np.frombuffer(struct.pack("<Q", len(frame)) + frame + rest, dtype=np.uint8)


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**40) + b"\x01\x00\x00", "claims 1099511627776 bytes"),
        (zstandard.compress(bytes(2**20)), "claims 1048576 bytes"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(24)), "claims"),
        (b"\x28\xb5\x2f\xfd\x80\x90" + struct.pack("<I", 24) + b"\x01\x00\x00", "window of 268435456"),
        (zstandard.compress(bytes(24)) + b"more", "cannot be read"),
        (zstandard.compress(bytes(24))[:-1], "cannot be read"),
        (b"\x50\x2a\x4d\x18\x04\x00\x00\x00none", "claims|cannot be read"),  # a skippable frame
        (b"", "cannot be read"),
        (b"not a frame", "cannot be read"),
    ],
)
def test_zstd_frame_that_does_not_fit_the_tensor_is_refused(frame, match):
    with pytest.raises(BlockError, match=match):
        BUILT_IN["zstd"].decode(with_frame(frame), (2, 3, 4), torch.float8_e5m2)


def test_zstd_frame_longer_than_its_payload_is_refused():
    payload = BUILT_IN["zstd"].encode(torch.zeros(2, 3, 4)).copy()
    payload[:8] = 255
    with pytest.raises(BlockError, match="cut short"):
        BUILT_IN["zstd"].decode(payload, (2, 3, 4), torch.float32)
