"""The byte encoding of token ids, which keeps their order, prefixes and common runs."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvtier.store.chain import common_run
from kvtier.store.tiers.disk.catalog.id_codes import decode_ids, encode_ids

FIRST_LONG = 0xFF0000
EDGES = [
    0,
    1,
    0xFF,
    0xFFFF,
    FIRST_LONG - 1,
    FIRST_LONG,
    FIRST_LONG + 1,
    0xFFFFFF,
    2**24,
    2**62,
    2**63 - 1,
    -1,
    -(2**63),
]
IDS = st.lists(st.sampled_from(EDGES) | st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=8)


def code(tokens):
    return encode_ids(np.array(tokens, dtype=np.int64))


def common_bytes(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def unsigned(tokens):
    return [token % 2**64 for token in tokens]


@given(IDS)
@example(EDGES)
def test_encoded_ids_decode_exactly_and_take_three_or_nine_bytes(tokens):
    assert decode_ids(code(tokens)).tolist() == tokens
    assert decode_ids(code(tokens)).dtype == np.int64
    assert len(code(tokens)) == sum(3 if 0 <= token < FIRST_LONG else 9 for token in tokens)


@given(IDS, IDS)
def test_codes_keep_the_unsigned_order_and_the_prefixes_of_ids(a, b):
    assert (code(a) < code(b)) == (unsigned(a) < unsigned(b))
    assert code(b).startswith(code(a)) == (b[: len(a)] == a)


@given(IDS, IDS, IDS)
def test_more_common_bytes_never_mean_fewer_common_ids(of, a, b):
    if common_bytes(code(of), code(a)) >= common_bytes(code(of), code(b)):
        runs = [common_run(np.array(each), np.array(of)) for each in (a, b)]
        assert runs[0] >= runs[1]


@pytest.mark.parametrize(
    "wrong", [b"\0", b"\0" * 4, b"\xff" + bytes(5), b"\0\0\1\xff\0\0", b"\xff" + bytes(8), b"\xff" * 10]
)
def test_decoding_invalid_bytes_raises_value_error(wrong):
    with pytest.raises(ValueError, match="code of ids"):
        decode_ids(wrong)


@given(st.binary(max_size=40))
def test_every_decodable_code_is_the_only_code_of_its_ids(anything):
    try:
        tokens = decode_ids(anything)
    except ValueError:
        return
    assert encode_ids(tokens) == anything
