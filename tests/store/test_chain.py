"""Block keys, and the common run of two token sequences."""

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.store.chain import BlockId, block_key, common_run
from tests.support.stores import OTHER_ROOT, ROOT, ids

TOKENS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=12)


def test_key_is_sha256_of_the_parent_and_little_endian_int64():
    expected = hashlib.sha256(bytes.fromhex(ROOT) + struct.pack("<3q", 1, -2, 3)).hexdigest()
    assert block_key(ROOT, ids(1, -2, 3)) == expected


@pytest.mark.parametrize("dtype", [np.int32, np.int64, ">i8"])
def test_key_does_not_depend_on_dtype_byte_order_or_strides_of_the_ids(dtype):
    assert block_key(ROOT, np.array([1, 2, 3], dtype=dtype)) == block_key(ROOT, ids(1, 2, 3))
    assert block_key(ROOT, np.array([1, 9, 2, 9, 3, 9], dtype=dtype)[::2]) == block_key(ROOT, ids(1, 2, 3))


@given(TOKENS, TOKENS)
def test_keys_differ_where_tokens_or_parents_differ(a, b):
    assert (block_key(ROOT, ids(*a)) == block_key(ROOT, ids(*b))) == (a == b)
    assert block_key(ROOT, ids(*a)) != block_key(OTHER_ROOT, ids(*a))


@given(TOKENS, TOKENS)
def test_common_run_is_the_length_of_the_longest_shared_prefix(a, b):
    n = common_run(ids(*a), ids(*b))
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
    assert n == common_run(ids(*b), ids(*a))


def test_block_id_key_depends_on_the_parent():
    first = BlockId.of(ROOT, ROOT, ids(1, 2))
    second = BlockId.of(ROOT, first.key, ids(1, 2))
    assert first.key != second.key
    assert (second.parent, second.root, second.tokens.tolist()) == (first.key, ROOT, [1, 2])
