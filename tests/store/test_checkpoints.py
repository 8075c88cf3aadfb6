"""Checkpoints in a store: bitwise restore, lookup by the tokens before them, and removal with their chain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier import PrefixStore
from kvtier.errors import BlockError, RestoreError
from kvtier.store.block import Block
from kvtier.store.chain import BlockId
from kvtier.store.format.block_file import BlockFile, encode_block
from tests.support.stores import OTHER_ROOT, ROOT, count, truth

SIZE = 4


def states(n: int, nbytes: int = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def keep(store, tokens, *positions, root=ROOT):
    kept = {position: states(position) for position in positions}
    return store.commit(root, tokens, lambda start, stop: truth(root, tokens, start, stop), {"of": "a test"}, kept)


def positions(store, tokens, limit=None, root=ROOT):
    return [position for position, _ in store.checkpoints(root, tokens, len(tokens) - 1 if limit is None else limit)]


def test_checkpoint_states_are_restored_bitwise(reopened):
    make, again = reopened
    store = make()
    tokens = count(11)
    keep(store, tokens, 6, 11)
    store = again(store)
    longer = count(13)
    match = store.match(ROOT, longer, 12)
    assert match.length == 11
    for position, checkpoint in store.checkpoints(ROOT, longer, 12):
        with_pages = store.restore([match.between(0, position)], [checkpoint])
        assert torch.equal(with_pages.states(0), states(position))
        with_pages.close()
        alone = store.restore([()], [checkpoint])
        assert alone.nbytes == 0
        assert torch.equal(alone.states(0), states(position))
        alone.close()


@pytest.mark.parametrize("at", [1, 3, 4, 5, 8, 11, 12])
def test_checkpoint_is_found_by_exactly_the_tokens_before_it(reopened, at):
    """Also at the end of a block, where a block without states has the same ids."""
    make, again = reopened
    store = make()
    keep(store, count(12), at)
    store = again(store)
    assert positions(store, count(14)) == [at]
    assert positions(store, count(14), limit=at) == [at]
    assert positions(store, count(14), limit=at - 1) == []
    other = count(14)
    other[at - 1] += 50
    assert positions(store, other) == []
    other = count(14)
    other[at] += 50
    assert positions(store, other) == [at]
    assert positions(store, count(14), root=OTHER_ROOT) == []


def test_checkpoints_are_listed_longest_first(reopened):
    make, again = reopened
    store = make()
    keep(store, count(12), 2, 3, 4, 8, 9, 12)
    store = again(store)
    assert positions(store, count(20)) == [12, 9, 8, 4, 3, 2]
    assert positions(store, count(20), limit=8) == [8, 4, 3, 2]


def test_checkpoint_stays_when_a_longer_chain_is_stored(reopened):
    """A longer tail block replaces one without states; tail blocks with states stay."""
    make, again = reopened
    store = make()
    keep(store, count(6), 6)
    keep(store, count(15), 15)
    store = again(store)
    assert positions(store, count(20)) == [15, 6]


def test_commit_with_an_empty_checkpoint_map_stores_no_tail_block():
    with PrefixStore(block_size=SIZE) as store:
        assert keep(store, count(11)) == 8
        assert store.match(ROOT, count(20)).length == 8


def test_checkpoint_of_a_model_without_kv_layers_is_restored(reopened):
    make, again = reopened
    store = make()
    tokens = count(10)
    store.commit(ROOT, tokens, lambda start, stop: (), {"of": "a test"}, {10: states(10)})
    store = again(store)
    assert store.match(ROOT, count(12)).length == 10
    ((position, checkpoint),) = store.checkpoints(ROOT, count(12), 11)
    assert position == 10
    restore = store.restore([()], [checkpoint])
    assert torch.equal(restore.states(0), states(10))
    restore.close()


def test_damaged_checkpoint_is_detected_and_removed(tmp_path, caplog):
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        keep(store, count(6), 6)
    (file,) = (f for f in tmp_path.glob("blocks/*/*/*.safetensors") if b'"states"' in f.read_bytes())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        ((_, checkpoint),) = store.checkpoints(ROOT, count(8), 7)
        restore = store.restore([()], [checkpoint])
        with pytest.raises(RestoreError, match="checksum"):
            restore.states(0)
        restore.close()
        assert positions(store, count(8)) == []
    assert "was removed" in caplog.text


def test_block_file_whose_key_contradicts_its_states_is_refused(tmp_path):
    """A checkpoint cannot pass for a block without states, nor such a block for a checkpoint."""
    pages = truth(ROOT, count(3), 0, 3)
    plain = BlockId.of(ROOT, ROOT, count(3))
    assert (plain.is_checkpoint, plain.checkpoint.is_checkpoint) == (False, True)
    for block in (
        Block(plain, pages, 0, states(1)), Block(plain.window, pages, 0, states(1)), Block(plain.checkpoint, pages)
    ):  # fmt: skip
        path = tmp_path / "block"
        path.write_bytes(b"".join(encode_block(block)))
        with pytest.raises(BlockError, match="ids do not give its key"):
            BlockFile(str(path))


def test_checkpoint_bytes_count_in_every_tier(tmp_path):
    with PrefixStore(tmp_path, block_size=SIZE, host_budget="1MiB") as store:
        tokens = count(3)
        store.commit(ROOT, tokens, lambda a, b: truth(ROOT, tokens, a, b), {}, {3: states(3, 500_000)})
        store.flush()
        assert all(tier.nbytes > 500_000 for tier in store.stats().tiers)


# --- names, forgetting, archives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [6, 8])
def test_pinned_name_keeps_its_checkpoint(reopened, length):
    make, again = reopened
    store = make()
    keep(store, count(length), 5, length)
    named = store.name("chat", ROOT, count(length), pin=True)
    assert named.tokens == named.kept_tokens == length
    if store.path is not None:
        store.prune(to_bytes=0)
        store = again(store)
        assert positions(store, count(20)) == [length]
        assert store.tokens_of("chat").tolist() == count(length).tolist()


def test_forgetting_a_name_removes_all_checkpoints_of_its_chain(reopened):
    make, _ = reopened
    store = make()
    keep(store, count(6), 2, 6)
    keep(store, count(15), 8, 11, 15)
    store.name("chat", ROOT, count(15))
    store.forget("chat")
    assert list(store.chains()) == []
    assert positions(store, count(20)) == []


def test_forgetting_a_name_keeps_blocks_shared_with_another_chain(reopened):
    make, again = reopened
    store = make()
    keep(store, count(10), 10)
    store.name("chat", ROOT, count(10))
    other = np.concatenate([count(8), count(3, 70)])
    keep(store, other, 11)
    store.forget("chat")
    store = again(store)
    assert positions(store, count(12)) == []
    assert positions(store, np.concatenate([other, count(2)])) == [11]
    assert store.match(ROOT, count(12)).length == 8


def test_forgetting_token_ids_removes_their_checkpoints(reopened):
    make, _ = reopened
    store = make()
    keep(store, count(10), 3, 6, 8, 10)
    store.forget(count(5))
    assert positions(store, count(12)) == []
    assert store.match(ROOT, count(12)).length == 0


@pytest.mark.parametrize("length", [6, 8])
@pytest.mark.parametrize("pages", [True, False], ids=["with-windows", "states-only"])
def test_archive_carries_the_checkpoint_at_its_end(tmp_path, length, pages):
    tokens = count(length)
    with PrefixStore(tmp_path / "a", block_size=SIZE) as store:
        read = (lambda a, b: truth(ROOT, tokens, a, b)) if pages else (lambda a, b: ())
        store.commit(ROOT, tokens, read, {"of": "a test"}, {3: states(3), length: states(length)})
        store.name("chat", ROOT, tokens)
        store.export("chat", tmp_path / "chat.safetensors")
    with PrefixStore(tmp_path / "b", block_size=SIZE) as store:
        assert store.import_(tmp_path / "chat.safetensors").kept_tokens == length
        ((position, checkpoint),) = store.checkpoints(ROOT, count(20), 19)
        assert position == length
        restore = store.restore([()], [checkpoint])
        assert torch.equal(restore.states(0), states(length))
        restore.close()
