"""A store that a later turn opens again."""

from __future__ import annotations

import pytest

from kvtier import PrefixStore


@pytest.fixture(params=["host", "raw", "zstd"])
def reopened(request, tmp_path):
    """Yield ``make`` and ``again``: ``again(store)`` is the next turn's store, in RAM the same, on disk a new one.

    Blocks have 4 tokens.
    """
    opened = []

    def make():
        if request.param == "host":
            opened.append(PrefixStore(block_size=4))
        else:
            opened.append(PrefixStore(tmp_path, block_size=4, compression=request.param))
        return opened[-1]

    def again(store):
        if request.param == "host":
            return store
        store.close()
        return make()

    yield make, again
    for store in opened:
        store.close()
