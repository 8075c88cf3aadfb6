"""TierChecks: what every tier must do, as a class to subclass in a test."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import numpy as np
import torch

from kvtier.kv.page import Page, PageView
from kvtier.store.block import Block, BlockReader
from kvtier.store.chain import BlockId, BlockKind, TokenIds, chain_keys, common_run
from kvtier.store.tiers.base import OrderedTier, Presence, PutResult, Tier

_ROOT = "00" * 32
_BLOCK_TOKENS = 4
_SECONDS = 60.0  # that no tier needs for an answer in a test


class TierChecks:
    """Subclass it as ``Test…`` and define the fixture ``tier``, which yields an empty tier with room, and closes it."""

    def test_a_block_is_present_once_it_is_put(self, tier: Tier) -> None:
        """Answers come in the order of the keys, whatever is asked beside."""
        blocks = _chain(5)
        for block in blocks[:3]:
            assert tier.put(block) is PutResult.KEPT
        keys = [each.id.key for each in reversed(blocks)]
        absent, present = Presence.ABSENT, Presence.PRESENT
        assert _presence(tier, keys) == [absent, absent, present, present, present]
        assert _presence(tier, []) == []
        assert _presence(tier, keys[-1:] * 3) == [present] * 3

    def test_what_is_opened_is_what_was_put(self, tier: Tier) -> None:
        """Every bit of every page, its ids, and its layers; None for a block that is not here."""
        blocks = _chain(3)
        for block in blocks[:2]:
            tier.put(block)
        *found, missing = _open_all(tier, blocks)
        assert missing is None
        for block, reader in zip(blocks, found, strict=False):
            assert reader is not None
            assert reader.id == block.id or (reader.id.key, reader.id.root) == (block.id.key, block.id.root)
            assert np.array_equal(reader.id.tokens, block.id.tokens)
            assert len(reader.spec.layers) == len(block.pages)
            for layer, page in enumerate(block.pages):
                _assert_same(reader.page(layer), page)
            assert reader.states() is None
            reader.close()

    def test_a_part_of_a_page_lands_where_it_should(self, tier: Tier) -> None:
        """Tokens ``[1, 3)``, and all of them, each into a part of a larger buffer."""
        (block,) = _chain(1)
        tier.put(block)
        (reader,) = _open_all(tier, [block])
        assert reader is not None
        for layer, page in enumerate(block.pages):
            for first, last in ((1, 3), (0, _BLOCK_TOKENS)):
                k = torch.zeros(page.k_htd.shape[0], 9, page.k_htd.shape[2], dtype=page.k_htd.dtype)
                v = torch.zeros(page.v_htd.shape[0], 9, page.v_htd.shape[2], dtype=page.v_htd.dtype)
                reader.landing(layer, first, last, PageView.on(k, v).cut(2, 2 + last - first))()
                assert torch.equal(k[:, 2 : 2 + last - first], page.k_htd[:, first:last])
                assert torch.equal(v[:, 2 : 2 + last - first], page.v_htd[:, first:last])
                assert not k[:, :2].any()
                assert not v[:, 2 + last - first :].any()
        reader.close()

    def test_a_block_that_is_put_again_is_kept_once(self, tier: Tier) -> None:
        """It has the same bytes: a block never changes."""
        (block,) = _chain(1)
        assert tier.put(block)
        before = tier.stats(0).nbytes
        assert tier.put(block)
        assert (tier.stats(0).blocks, tier.stats(0).nbytes) == (1, before)

    def test_forgotten_blocks_are_absent_and_readers_may_finish(self, tier: Tier) -> None:
        """The last of a chain first; unknown keys, and keys that are forgotten again, are ignored."""
        blocks = _chain(3)
        for block in blocks:
            tier.put(block)
        (reader,) = _open_all(tier, blocks[2:])
        assert reader is not None
        tier.discard_all([blocks[2].id.key, "ff" * 32])
        tier.discard_all([blocks[2].id.key])
        assert _presence(tier, [each.id.key for each in blocks])[2] is Presence.ABSENT
        assert _open_all(tier, blocks[2:]) == [None]
        _assert_same(reader.page(0), blocks[2].pages[0])
        reader.close()
        assert tier.put(blocks[2])
        assert _presence(tier, [blocks[2].id.key]) == [Presence.PRESENT]

    def test_entries_and_stats_agree(self, tier: Tier) -> None:
        """Of an empty tier, and of one with blocks; a use of unknown blocks is ignored."""
        assert list(tier.entries()) == []
        blocks = _chain(4)
        for block in blocks:
            tier.put(block)
        tier.touch([each.id.key for each in blocks] + ["ff" * 32], {blocks[0].id.key: 2, "ff" * 32: 1})
        tier.flush()
        found = {entry.key: entry for entry in tier.entries()}
        assert found.keys() == {each.id.key for each in blocks}
        for block in blocks:
            entry = found[block.id.key]
            assert (entry.parent, entry.root, entry.tokens) == (block.id.parent, block.id.root, _BLOCK_TOKENS)
            assert entry.depth_tokens == block.depth_tokens
            assert entry.nbytes > 0
        stats = tier.stats(7)
        assert (stats.tier, stats.blocks, stats.hits) == (tier.name, 4, 7)
        assert stats.nbytes >= sum(entry.nbytes for entry in found.values())
        assert not stats.budget_bytes or stats.nbytes <= stats.budget_bytes

    def test_entries_tell_window_blocks(self, tier: Tier) -> None:
        """A block and its window block have the same ids, and are two blocks."""
        (block,) = _chain(1)
        window = Block(block.id.window, block.pages)
        tier.put(block)
        tier.put(window)
        assert {entry.key: entry.is_window for entry in tier.entries()} == {block.id.key: False, window.id.key: True}

    def test_blocks_may_have_empty_pages(self, tier: Tier) -> None:
        """Of all layers, or of some: sliding layers have none in a block of the chain, and alone have some beside."""
        first, second = _chain(2)
        empty = torch.empty(0, _BLOCK_TOKENS, 0, device="cpu")
        nothing = Page(empty, empty)
        blocks = [
            Block(first.id, (nothing, nothing)),
            Block(first.id.window, first.pages),
            Block(second.id, (nothing, second.pages[1]), second.depth_tokens),
            Block(second.id.window, (second.pages[0], nothing), second.depth_tokens),
        ]
        for block in blocks:
            assert tier.put(block) is PutResult.KEPT
        for block, reader in zip(blocks, _open_all(tier, blocks), strict=True):
            assert reader is not None
            assert [layer.token_bytes for layer in reader.spec.layers] == [
                page.nbytes // _BLOCK_TOKENS for page in block.pages
            ]
            for layer, page in enumerate(block.pages):
                _assert_same(reader.page(layer), page)
                k, v = (torch.zeros_like(part) for part in (page.k_htd, page.v_htd))
                reader.landing(layer, 0, _BLOCK_TOKENS, PageView.on(k, v))()
                _assert_same(Page(k, v), page)
            reader.close()

    def test_it_shrinks_to_what_is_asked(self, tier: Tier) -> None:
        """To half, to nothing; what is left is whole chains from their beginning, as far as the tier knows chains."""
        blocks = _chain(6)
        for block in blocks:
            tier.put(block)
        half = tier.stats(0).nbytes // 2
        tier.shrink(half)
        assert tier.stats(0).nbytes <= half
        tier.shrink(0)
        assert (tier.stats(0).nbytes, tier.stats(0).blocks) == (0, 0)
        assert set(_presence(tier, [each.id.key for each in blocks])) == {Presence.ABSENT}

    def test_threads_may_use_it_at_once(self, tier: Tier) -> None:
        """Blocks are put, opened and forgotten side by side; what is opened is right."""
        chains = [_chain(6, first=100 * number) for number in range(4)]

        def use(blocks: list[Block]) -> None:
            for _ in range(5):
                for block in blocks:
                    tier.put(block)
                for block, reader in zip(blocks, _open_all(tier, blocks), strict=True):
                    if reader is not None:
                        _assert_same(reader.page(1), block.pages[1])
                        reader.close()
                tier.discard_all([each.id.key for each in reversed(blocks)])

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(use, chains))
        assert tier.stats(0).blocks == 0

    def test_it_may_be_closed_twice(self, tier: Tier) -> None:
        """With blocks in it."""
        for block in _chain(2):
            tier.put(block)
        tier.close()
        tier.close()


class OrderedTierChecks(TierChecks):
    """The checks of a tier that also finds prefixes to the token. Use it like ``TierChecks``."""

    def test_nearest_is_a_block_with_the_longest_common_run(self, tier: OrderedTier) -> None:
        """Of siblings that share 0 to 3 ids with what is asked for."""
        siblings = [_sibling(*ids) for ids in ((9, 1, 2, 3), (0, 9, 2, 3), (0, 1, 9, 3), (0, 1, 2, 9))]
        asked = np.arange(4, dtype=np.int64)
        assert list(tier.nearest(_ROOT, asked)) == []
        for shared, block in enumerate(siblings):
            tier.put(block)
            assert max(common_run(found.tokens, asked) for found in tier.nearest(_ROOT, asked)) == shared

    def test_no_kind_of_block_hides_another(self, tier: OrderedTier) -> None:
        """A window block with the same ids, or closer ones, is never taken for a block of the chain, nor the reverse.

        Each kind is put, and forgotten, before and after the others.
        """
        (plain,) = _chain(1)
        closer = _sibling(*plain.id.tokens.tolist(), 70)
        asked = np.concatenate([plain.id.tokens, np.array([70, 71])])
        for kinds in permutations(BlockKind):
            here: list[Block] = []
            for block in (plain, closer):
                for kind in kinds:
                    here.append(Block(_of_kind(block.id, kind), block.pages))
                    assert tier.put(here[-1])
                    _check_found(tier, here, asked)
            while here:
                tier.discard(here.pop(0).id.key)
                _check_found(tier, here, asked)


def _sibling(*ids: int) -> Block:
    return _block(BlockId.of(_ROOT, _ROOT, np.array(ids, dtype=np.int64)), 0)


def _of_kind(block: BlockId, kind: BlockKind) -> BlockId:
    return BlockId.of(block.root, block.parent, block.tokens, kind)


def _check_found(tier: OrderedTier, here: Sequence[Block], asked: TokenIds) -> None:
    """Check what ``tier``, which holds the blocks ``here``, finds for ``asked``."""
    assert {tail.key for tail in tier.tails(_ROOT, asked)} == {block.id.key for block in here}
    for windows in (False, True):
        best = max((len(block.id.tokens) for block in here if block.id.is_window == windows), default=0)
        found = list(tier.nearest(_ROOT, asked, windows=windows))
        assert all(block.is_window == windows for block in found)
        assert max((common_run(block.tokens, asked) for block in found), default=0) == best


def _chain(count: int, first: int = 0) -> list[Block]:
    """Return ``count`` blocks of two layers, each after the one before."""
    tokens = np.arange(first, first + count * _BLOCK_TOKENS, dtype=np.int64)
    return [_block(each, depth * _BLOCK_TOKENS) for depth, each in enumerate(chain_keys(_ROOT, tokens, _BLOCK_TOKENS))]


def _block(identity: BlockId, depth_tokens: int) -> Block:
    drawn = torch.Generator().manual_seed(int(identity.tokens[0]))

    def page(heads: int, dim: int, dtype: torch.dtype) -> Page:
        tokens = len(identity.tokens)
        k, v = (torch.randn(heads, tokens, size, generator=drawn, device="cpu") for size in (dim, dim // 2))
        return Page(k.to(dtype), v.to(dtype))

    return Block(identity, (page(2, 8, torch.float32), page(1, 4, torch.bfloat16)), depth_tokens)


def _presence(tier: Tier, keys: Sequence[str]) -> list[Presence]:
    return list(tier.presence(keys).result(_SECONDS))


def _open_all(tier: Tier, blocks: Sequence[Block]) -> list[BlockReader | None]:
    return [future.result(_SECONDS) for future in tier.open_all([block.id for block in blocks])]


def _assert_same(page: Page, expected: Page) -> None:
    assert page.k_htd.dtype == expected.k_htd.dtype
    assert torch.equal(page.k_htd, expected.k_htd)
    assert torch.equal(page.v_htd, expected.v_htd)
