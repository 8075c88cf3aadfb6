"""Concurrent restores of a block read it once, in bounded memory."""

import threading

import pytest
import torch

from kvtier.errors import BlockError
from kvtier.kv.page import PageView
from kvtier.store.tiers.host.tier import HostReader
from kvtier.store.tiers.leases import Leases
from kvtier.store.tiers.shared_reads import ReadCoalescer
from tests.support.stores import block, count, same_bits

BLOCK = block(count(4))
PAGE_BYTES = BLOCK.pages[0].nbytes


class Drive(HostReader):
    """A block that counts how often each of its pages is read."""

    is_plain = True

    def __init__(self):
        super().__init__(BLOCK, Leases().prepare_load("ab"))
        self.reads, self.closed = [], False

    def page(self, layer):
        self.reads.append(layer)
        return super().page(layer)

    def landing(self, layer, *where, check=True):
        self.reads.append(layer)
        return super().landing(layer, *where)

    def hold(self):
        pass

    def close(self):
        self.closed = True


def landed(reader, layer):
    k_htd, v_htd = torch.zeros_like(BLOCK.pages[layer].k_htd), torch.zeros_like(BLOCK.pages[layer].v_htd)
    reader.landing(layer, 0, 4, PageView.on(k_htd, v_htd))()
    return same_bits(k_htd, BLOCK.pages[layer].k_htd) and same_bits(v_htd, BLOCK.pages[layer].v_htd)


@pytest.fixture
def drive():
    return Drive()


def opened(drive, readers, **settings):
    loads = ReadCoalescer(Leases(), **settings)
    return loads, [loads.open(BLOCK.id, lambda: drive) for _ in range(readers)]


def test_page_is_read_once_for_all_readers_and_then_released(drive):
    loads, readers = opened(drive, 3, held_bytes=PAGE_BYTES)
    for layer in (0, 1):
        assert all(landed(reader, layer) for reader in readers)
    assert drive.reads == [0, 1]
    assert loads._left == PAGE_BYTES
    for reader in readers:
        assert not drive.closed
        reader.close()
        reader.close()
    assert drive.closed
    assert not loads._loads


def test_held_pages_stay_within_held_bytes(drive):
    loads, (first, second) = opened(drive, 2, held_bytes=PAGE_BYTES)
    assert landed(first, 0)
    assert landed(first, 1)
    assert loads._left == 0, "the first page waits, for a second one there is no room"
    assert landed(second, 1)
    assert landed(second, 0)
    assert sorted(drive.reads) == [0, 1, 1]
    assert loads._left == PAGE_BYTES


def test_no_page_is_held_for_a_detached_reader(drive):
    _, (first, second) = opened(drive, 2)
    second.detach()
    assert landed(first, 0)
    assert landed(first, 0)
    assert drive.reads == [0, 0]
    assert landed(second, 0)
    assert drive.reads == [0, 0, 0]


def test_closing_a_reader_early_releases_the_pages_held_for_it(drive):
    loads, (first, second) = opened(drive, 2)
    before = loads._left
    assert landed(first, 0)
    assert loads._left == before - PAGE_BYTES
    second.close()
    assert loads._left == before
    assert not drive.closed


def test_failed_page_read_is_raised_to_every_reader(drive, monkeypatch):
    _, readers = opened(drive, 2)

    def fail(layer):
        drive.reads.append(layer)
        raise BlockError("the platter is scratched")

    monkeypatch.setattr(drive, "page", fail)
    for reader in readers:
        with pytest.raises(BlockError, match="scratched"):
            landed(reader, 0)
    assert drive.reads == [0]


def test_interrupt_stops_one_reader_and_the_other_reads_the_page(drive, monkeypatch):
    _, (first, second) = opened(drive, 2)
    begun, go_on, answers = threading.Event(), threading.Event(), []
    page = drive.page

    def interrupted(layer):
        monkeypatch.setattr(drive, "page", page)
        begun.set()
        assert go_on.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(drive, "page", interrupted)

    def read(reader):
        try:
            answers.append(landed(reader, 0))
        except KeyboardInterrupt:
            answers.append("interrupted")

    threads = [threading.Thread(target=read, args=(first,))]
    threads[0].start()
    assert begun.wait(30)
    threads.append(threading.Thread(target=read, args=(second,)))
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert sorted(map(str, answers)) == ["True", "interrupted"]


def test_concurrent_readers_get_the_right_bytes(drive):
    loads = ReadCoalescer(Leases(), held_bytes=PAGE_BYTES)
    wrong = []

    def work(turn):
        for layer in (turn % 2, 1 - turn % 2):
            reader = loads.open(BLOCK.id, Drive)
            if not landed(reader, layer):
                wrong.append(layer)
            reader.close()

    threads = [threading.Thread(target=lambda n=n: [work(n + i) for i in range(30)]) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not loads._loads
    assert loads._left == PAGE_BYTES
