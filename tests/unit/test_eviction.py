"""Leaf first, the least recently used among them."""

import pytest

from kvtier.store.eviction import leaf_first_lru


@pytest.mark.parametrize(
    ("parents", "protected", "expected"),
    [
        ((), (), "a"),
        (("a",), (), "b"),
        (("a", "b"), (), "c"),
        ((), ("a",), "b"),
        (("b",), ("a",), "c"),
        (("a", "b", "c"), (), None),
        ((), ("a", "b", "c"), None),
    ],
)
def test_the_oldest_block_without_children_goes(parents, protected, expected):
    assert leaf_first_lru(["a", "b", "c"], parents.__contains__, protected.__contains__) == expected
