"""Writes, uses, damage and lower tiers of window blocks."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
import torch

from kvtier import PrefixStore
from kvtier.errors import ArchiveError, BlockError, RestoreError, StoreError
from kvtier.kv.page import Page, PageView
from kvtier.store.commit import Windows
from kvtier.store.format.archive import Archive
from tests.support.dict_tier import DictTier
from tests.support.stores import DIM, HEADS, ROOT, block_files, count, damage, ids, same_bits
from tests.support.windows import check_restored, found, keep, pages, united

SIZE = 4


def lose_files(store):
    """Forget all blocks on disk: they are in RAM alone."""
    store._tiers.last.discard_all([entry.key for entry in store._tiers.last.entries()])


def test_window_is_written_after_blocks_that_disk_lost(tmp_path):
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        keep(store, count(10))
        store.flush()
        lose_files(store)
        keep(store, count(10), (4, 10))
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        assert found(store, count(10)) == [(4, 10)]


def test_windows_that_disk_lost_are_written_again(tmp_path):
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        keep(store, count(10), (4, 10))
        store.flush()
        lose_files(store)
        keep(store, count(10), (4, 10))
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        assert found(store, count(10)) == [(4, 10)]


def test_window_that_disk_has_no_room_for_stops_no_block_of_the_chain(tmp_path):
    large = torch.zeros(1, SIZE, 100_000)

    def read_window(start, stop):
        return (Page(torch.empty(0, SIZE, 0), torch.empty(0, SIZE, 0)), Page(large, large), Page(large, large))

    with PrefixStore(tmp_path, block_size=SIZE, disk_budget="1MiB") as store:
        for _ in range(2):
            store.commit(
                ROOT, count(12), lambda a, b: pages(ROOT, count(12), a, b, window=False), {},
                windows=Windows(((0, 8),), read_window),
            )  # fmt: skip
            assert found(store, count(12)) == [(0, 8)]  # in RAM
            store.flush()
            assert {entry.is_window for entry in store._tiers.last.entries()} == {False}
            assert store._tiers.last.catalog.counts() == (3, 0)
            lose_files(store)


def test_block_without_room_has_no_window():
    """Nor where the window block, of one layer, would have room."""
    with PrefixStore(block_size=SIZE, host_budget=SIZE * 64 + 1) as store:
        assert keep(store, count(8), (0, 8), slides=(2,)) == 0
        assert list(store._tiers.entries()) == []


def test_windows_are_touched_with_their_blocks(tmp_path):
    with PrefixStore(tmp_path, block_size=SIZE, tail_delay=0) as store:
        keep(store, count(10), (0, 4), (8, 10))
        keep(store, count(10), (0, 4))
        store.flush()
        for tier in store._tiers.tiers:
            uses = {(entry.is_window, entry.depth_tokens): entry.uses for entry in tier.entries()}
            assert uses == {(False, 0): 2, (False, 4): 2, (False, 8): 2, (True, 0): 2, (True, 8): 1}


@pytest.mark.parametrize("budget", [{"host_budget": 400}, {"disk_budget": 4096, "host_budget": 1}])
@pytest.mark.parametrize("with_states", [False, True])
def test_window_never_takes_the_room_of_its_block(tmp_path, budget, with_states):
    states = {3: torch.zeros(8, dtype=torch.uint8)} if with_states else None
    with PrefixStore(
        tmp_path if "disk_budget" in budget else None, block_size=SIZE, free_space_floor=0, **budget
    ) as store:
        keep(store, count(3), (0, 3), states=states)
        store.flush()
        assert store.match(ROOT, count(4)).length == 3
        assert found(store, count(4)) == []


def test_window_of_a_block_and_its_checkpoints_is_read_and_touched_once():
    """The longest covers the others."""
    read: list[tuple[int, int]] = []

    def read_window(start, stop):
        read.append((start, stop))
        return pages(ROOT, count(8), start, stop, window=True)

    states = {position: torch.zeros(8, dtype=torch.uint8) for position in (1, 3, 4, 6, 7)}
    with PrefixStore(block_size=SIZE) as store:
        store.commit(
            ROOT, count(7), lambda a, b: pages(ROOT, count(7), a, b, window=False), {}, states,
            windows=Windows(((0, 7),), read_window),
        )  # fmt: skip
        assert read == [(0, 4), (4, 7)]
        assert [entry.uses for entry in store._tiers.entries() if entry.is_window] == [1, 1]


def test_windows_are_written_on_second_use(tmp_path):
    with PrefixStore(tmp_path, block_size=SIZE, write_on="second-use") as store:
        for blocks in (0, 5):
            keep(store, count(10), (0, 4), (8, 10))
            store.flush()
            assert len(block_files(tmp_path)) == blocks
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        assert found(store, count(10)) == [(0, 4), (8, 10)]


def test_naming_writes_windows_that_are_in_ram_alone(tmp_path):
    with PrefixStore(tmp_path, block_size=SIZE, write_on="second-use") as store:
        keep(store, count(10), (0, 4), (4, 8), (8, 10))
        store.name("chat", ROOT, count(10))
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        assert found(store, count(10)) == [(0, 10)]


def test_window_tail_of_a_running_conversation_is_written_once(tmp_path):
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        for length in (1, 2, 3):
            keep(store, count(length), (0, length))
        store.flush()
        files = block_files(tmp_path)
        assert len(files) == 2
        assert store.stats().written_bytes == sum(file.stat().st_size for file in files)


def test_windows_go_below_and_are_asked_for_once():
    tier = DictTier()
    with PrefixStore(block_size=SIZE, lower_tiers=[tier]) as store:
        keep(store, count(18), (0, 8), (12, 18))
        store.flush()
        assert sum(block.id.is_window for block in tier.blocks.values()) == 3
    with PrefixStore(block_size=SIZE, lower_tiers=[tier]) as store:
        match = store.match(ROOT, count(18))
        tier.requests.clear()
        windows = store.windows(ROOT, count(18), match)
        assert tier.requests == [("presence", 4)]
        assert united(windows) == [(0, 8), (12, 16)]
        check_restored(store, match, windows, count(18))
        job = store.restore([match.spans], windows=[windows])
        assert {job.tier(span.block.key) for span in (*match.spans, *windows)} == {"dict"}
        job.close()


@pytest.mark.parametrize("how", ["flip", "delete"])
def test_damaged_window_costs_itself_alone(tmp_path, how):
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        keep(store, count(8), (0, 8))
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        match = store.match(ROOT, count(8))
        windows = store.windows(ROOT, count(8), match)
        (path,) = (path for path in block_files(tmp_path) if path.stem == windows[0].block.key)
        damage(path, how, -1)
        with pytest.raises((BlockError, RestoreError)):
            check_restored(store, match, windows, count(8))
        assert store.match(ROOT, count(8)).length == 8
        assert found(store, count(8)) == [(4, 8)]
        keep(store, count(8), (0, 8))
        assert found(store, count(8)) == [(0, 8)]


def test_windows_with_other_layers_are_odd():
    """Of three window blocks one has other layers; then all have, beside a block of the chain."""
    with PrefixStore(block_size=SIZE) as store:
        keep(store, count(8), (0, 8))
        keep(store, count(12), (8, 12), slides=(2,))
        match = store.match(ROOT, count(12))
        windows = store.windows(ROOT, count(12), match)
        with pytest.raises(BlockError, match="layers differ"):
            store.restore([match.spans[:2]], windows=[windows])
        assert found(store, count(12)) == [(0, 8)]
    with PrefixStore(block_size=SIZE) as store:
        less = Windows(((0, 4),), lambda start, stop: pages(ROOT, count(4), start, stop, window=True)[:2])
        store.commit(ROOT, count(4), lambda a, b: pages(ROOT, count(4), a, b, window=False), {}, windows=less)
        match = store.match(ROOT, count(4))
        with pytest.raises(BlockError, match="layers differ"):
            store.restore([match.spans], windows=[store.windows(ROOT, count(4), match)])
        assert (store.match(ROOT, count(4)).length, found(store, count(4))) == (4, [])


def test_dtype_of_empty_pages_does_not_matter():
    """It follows the default dtype of whoever commits."""
    with PrefixStore(block_size=SIZE) as store:
        keep(store, count(4), (0, 4))
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.bfloat16)
            nothing = Page(torch.empty(0, SIZE, 0), torch.empty(0, SIZE, 0))
        finally:
            torch.set_default_dtype(before)
        whole = pages(ROOT, count(8), 4, 8, window=False)
        store.commit(ROOT, count(8), lambda start, stop: (whole[0], nothing, nothing), {})
        match = store.match(ROOT, count(8))
        check_restored(store, match, store.windows(ROOT, count(8), match), count(8))


def test_rows_share_windows_and_load_parts_of_them():
    """The second row has a part of a window block of the first."""
    with PrefixStore(block_size=SIZE) as store:
        keep(store, count(10), (0, 10))
        other = ids(0, 1, 2, 3, 4, 5, 77)
        matches = [store.match(ROOT, tokens) for tokens in (count(10), other)]
        assert [match.length for match in matches] == [10, 6]
        windows = [
            store.windows(ROOT, tokens, match) for tokens, match in zip((count(10), other), matches, strict=True)
        ]
        rows = [matches[0].spans, matches[1].between(2, 6)]
        with_windows = [windows[0][1:], windows[1]]
        buffers = [[tuple(torch.zeros(HEADS, 10, DIM) for _ in "kv") for _ in rows] for _ in range(3)]
        job = store.restore(rows, windows=with_windows)
        assert job.nbytes == (10 + 4) * 64 + 2 * (6 + 6) * 64
        for layer in range(3):
            job.land(layer, lambda layer, row: (PageView.on(*buffers[layer][row]), 0), begin=0, end=8)
        for layer, per_row in enumerate(buffers):
            expected = pages(ROOT, count(10), 0, 10, window=layer > 0)[layer]
            for row, (first, last) in enumerate([(4 * (layer > 0), 8), (2 * (layer == 0), 6)]):
                for part, truth in zip(per_row[row], (expected.k_htd, expected.v_htd), strict=True):
                    assert same_bits(part[:, first:last], truth[:, first:last])
                    assert not part[:, :first].any()
                    assert not part[:, last:].any()
        job.close()


def test_row_of_another_kind_than_its_key_is_damage(tmp_path, caplog):
    """A catalog that takes a window block for a block of a chain is not believed, and is rebuilt."""
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        keep(store, count(6), (0, 6))
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as connection, connection:
        connection.execute("UPDATE blocks SET is_window = NOT is_window")
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        assert store.match(ROOT, ids(0, 1, 2, 9)).spans == ()
    assert "another kind than its key" in caplog.text
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        assert store.match(ROOT, count(6)).length == 6
        assert found(store, count(6)) == [(0, 6)]


@pytest.mark.parametrize("windows", [5, "ab", ["ab"], [5], [None], {"a": 1}, "a" * 64, None])
def test_name_with_unsound_windows_is_damaged(tmp_path, windows, caplog):
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        keep(store, count(6), (0, 6))
        store.name("chat", ROOT, count(6))
    (path,) = (tmp_path / "names").glob("*")
    record = json.loads(path.read_text())
    assert len(record["windows"]) == 2
    path.write_text(json.dumps(record | {"windows": windows}))
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        assert "no file of a name" in caplog.text or "hex" in caplog.text
        assert not store.verify().ok


def test_name_of_a_version_without_windows_is_read(tmp_path):
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        keep(store, count(6))
        store.name("chat", ROOT, count(6))
    (path,) = (tmp_path / "names").glob("*")
    record = json.loads(path.read_text())
    assert record.pop("windows") == []
    path.write_text(json.dumps(record))
    with PrefixStore(tmp_path, block_size=SIZE) as store:
        assert store.named("chat").kept_tokens == 6
        assert store.verify().ok


def test_import_without_room_for_the_windows_is_refused(tmp_path):
    with PrefixStore(block_size=SIZE) as store:
        keep(store, count(8), (0, 8))
        store.name("chat", ROOT, count(8))
        store.export("chat", tmp_path / "chat")
    chain_bytes = 8 * 64
    with (
        PrefixStore(block_size=SIZE, host_budget=chain_bytes + 100) as store,
        pytest.raises(StoreError, match="no room"),
    ):
        store.import_(tmp_path / "chat")


@pytest.mark.parametrize(
    ("windows", "shape"),
    [
        ('{"start":-4,"layers":[1,2]}', [0, 12, 0]),
        ('{"start":8,"layers":[1,2]}', [0, 0, 0]),
        ('{"start":4,"layers":[1,2,3]}', [0, 4, 0]),
        ('{"start":4,"layers":[]}', [0, 8, 0]),
    ],
)
def test_archive_whose_empty_layers_fit_unsound_windows_is_refused(tmp_path, windows, shape):
    file = tmp_path / "chat"
    with PrefixStore(block_size=SIZE) as store:
        keep(store, count(8))
        store.name("chat", ROOT, count(8))
        store.export("chat", file)
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["windows"] = windows
    for layer in (1, 2):
        assert header[f"k.{layer}"]["shape"] == [0, 8, 0]
        header[f"k.{layer}"]["shape"] = header[f"v.{layer}"]["shape"] = shape
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + size :])
    with pytest.raises(ArchiveError, match="windows"):
        Archive(file)
