"""``compression="auto"``: what was measured decides in which codec blocks are written."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from kvtier import PrefixStore
from kvtier.costs.book import CostBook
from kvtier.costs.transfer import TransferSample
from kvtier.kv.page import Page, PageView
from kvtier.store.block import Block
from kvtier.store.chain import BlockId
from kvtier.store.costs.codec_choice import CodecChoice
from tests.support.measured import measure
from tests.support.stores import ROOT, block, block_files, commit, count, restored_length

LONG = 256  # tokens of a block: the frames of smaller ones take more than they save
SLOW, FAST = 1e3, 1e11  # bytes a second


def codecs_of(folder):
    found = []
    for path in block_files(folder):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found.append(header["__metadata__"]["codec"])
    return sorted(found)


@pytest.mark.parametrize(
    ("compression", "speed", "loads", "codec"),
    [
        ("auto", SLOW, 4, "zstd"),
        ("auto", FAST, 4, "raw"),
        ("auto", SLOW, 2, "raw"),
        ("auto", None, 0, "raw"),
        ("raw", SLOW, 4, "raw"),
        ("zstd", FAST, 4, "zstd"),
    ],
)
def test_auto_chooses_the_codec_by_what_was_measured(tmp_path, compression, speed, loads, codec):
    with PrefixStore(tmp_path, block_size=LONG, compression=compression) as store:
        measure(store, speed=speed, loads=loads)
        commit(store, count(2 * LONG))
    assert codecs_of(tmp_path) == [codec] * 2
    with PrefixStore(tmp_path, block_size=LONG) as store:
        assert restored_length(store, count(2 * LONG)) == 2 * LONG


def test_a_chain_may_be_of_both_codecs(tmp_path):
    with PrefixStore(tmp_path, block_size=LONG) as store:
        measure(store)
        commit(store, count(LONG))
        store.flush()
        measure(store, speed=SLOW)
        commit(store, count(2 * LONG))
    assert codecs_of(tmp_path) == ["raw", "zstd"]
    with PrefixStore(tmp_path, block_size=LONG) as store:
        assert restored_length(store, count(2 * LONG)) == 2 * LONG


def test_trials_are_kept_for_the_next_process(tmp_path):
    with PrefixStore(tmp_path, block_size=LONG) as store:
        measure(store, speed=SLOW)
        commit(store, count(LONG))
        store.flush()
        found = store.costs(ROOT, "here").encoding("zstd")
        assert 0.5 < found.kept_share < 1.0
    with PrefixStore(tmp_path) as store:
        assert store.costs(ROOT, "here").encoding("zstd") == found


def test_a_block_that_the_turn_itself_writes_is_raw(tmp_path):
    """Where RAM has no room, nothing can be written behind the turn: it waits for no choice and no encoding."""
    with PrefixStore(tmp_path, block_size=LONG, host_budget=1) as store:
        measure(store, speed=SLOW)
        commit(store, count(LONG))
        assert store.costs(ROOT, "here").encoding("zstd") is None
    assert codecs_of(tmp_path) == ["raw"]


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_loads_tell_decoded_bytes_from_others(tmp_path, codec):
    decoded = block(count(LONG)).nbytes if codec == "zstd" else 0
    with PrefixStore(tmp_path, block_size=LONG, compression=codec, host_budget=1) as store:
        commit(store, count(LONG))
        store.flush()
        match = store.match(ROOT, count(LONG))
        fetch = store.fetch_from_the_back(store.restore([match.spans]))
        fetch.wait(0, 30)
        assert fetch.samples()["disk"].decoded_nbytes == decoded
        fetch.stop(0)
        fetch.job.close()
        job = store.restore([match.spans])
        buffers = [(page.k_htd.clone(), page.v_htd.clone()) for page in block(count(LONG)).pages]
        for layer in range(len(buffers)):
            job.land(layer, lambda layer, row: (PageView.on(*buffers[layer]), 0))
        assert job.samples()["disk"].decoded_nbytes == decoded
        job.close()


class Ticking:
    """Seconds that grow by as much at each look."""

    def __init__(self, step):
        self._ticks = itertools.count()
        self._step = step

    def __call__(self):
        return next(self._ticks) * self._step


def some_block(dtype=torch.bfloat16, layers=6):
    pages = tuple(Page(torch.randn(2, 64, 8).to(dtype), torch.randn(2, 64, 8).to(dtype)) for _ in range(layers))
    return Block(BlockId.of(ROOT, ROOT, count(64)), pages)


def slow_book(speed=SLOW):
    book = CostBook()
    for n in range(1, 5):
        book.note_load("disk", TransferSample(n * 10**6, n * 10**6 / speed))
    return book


def test_only_some_blocks_and_layers_are_tried():
    book = slow_book()
    choose = CodecChoice({ROOT: book}.get, "disk")
    tried = []
    note, book.note_trial = book.note_trial, lambda codec, sample: (tried.append(sample), note(codec, sample))
    one = some_block()
    names = {choose(one).name for _ in range(130)}
    assert names == {"zstd"}
    assert len(tried) == 3
    assert tried[0].nbytes == one.nbytes // 3


def test_nothing_is_tried_where_no_codec_could_pay():
    book = slow_book(speed=1e10)
    choose = CodecChoice({ROOT: book}.get, "disk")
    assert choose(some_block()).name == "raw"
    assert book.encoding("zstd") is None


def test_slow_decoding_is_not_chosen():
    book = slow_book()
    assert CodecChoice({ROOT: book}.get, "disk", Ticking(1e-6))(some_block()).name == "zstd"
    book = slow_book()
    assert CodecChoice({ROOT: book}.get, "disk", Ticking(1e6))(some_block()).name == "raw"


def test_blocks_of_windows_alone_and_of_no_bytes_are_tried():
    empty = Page(torch.empty(2, 0, 8), torch.empty(2, 0, 8))
    book = slow_book()
    one = some_block()
    CodecChoice({ROOT: book}.get, "disk")(Block(one.id, (empty, one.pages[0]) * 2))
    assert book.encoding("zstd").kept_share < 1
    book = slow_book()
    assert CodecChoice({ROOT: book}.get, "disk")(Block(one.id, (empty,))).name == "raw"
