"""Memory that a load provides ahead: exactly the bytes that it is going to write."""

from __future__ import annotations

import pytest

from kvtier import PrefixStore, TieredCache
from tests.support.tiny import answer, left_padded, tiny

FIRST, SECOND = (3, 1, 4, 1, 5, 2, 2, 5, 5, 3, 5, 1), (2, 4, 1, 3, 2, 5, 1, 2, 2, 3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("prompts", [[FIRST], [FIRST, FIRST], [FIRST, SECOND]], ids=["one", "twice", "padded"])
def test_load_provides_the_bytes_that_it_writes(name, prompts, monkeypatch):
    model, provided, written = tiny(name, 3), [], []
    monkeypatch.setattr("kvtier.kv.page.provide", lambda address, nbytes: provided.append((address, nbytes)))
    monkeypatch.setattr("kvtier.store.reading.load._at", noting(written))
    with PrefixStore(block_size=4) as store:
        with TieredCache(store) as cache:
            answer(model, left_padded(prompts), cache)
        assert not provided
        with TieredCache(store) as cache:
            answer(model, left_padded([(*prompt, 4, 4) for prompt in prompts]), cache)
            assert cache.last_turn.cached_tokens
    assert sorted(each for each in merged(provided)) == sorted(merged(written))


def noting(written):
    from kvtier.store.reading.load import _at

    def at(place, span):
        part = _at(place, span)
        written.extend((head.ctypes.data, head.nbytes) for head in (*part.k_htb, *part.v_htb))
        return part

    return at


def merged(memories):
    """Return the runs of memory that ``memories``, (address, bytes) each, make up."""
    runs = []
    for address, nbytes in sorted(memory for memory in memories if memory[1]):
        if runs and runs[-1][1] == address:
            runs[-1][1] = address + nbytes
        else:
            runs.append([address, address + nbytes])
    return runs
