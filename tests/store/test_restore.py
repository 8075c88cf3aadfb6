"""A restore reads each page once into its place, reports failed blocks, and writes nothing after close."""

import os
import signal
import threading

import pytest
import torch

from kvtier import BlockError, PrefixStore, RestoreError
from kvtier.kv.page import PageView
from kvtier.platform.descriptors import OF_THIS_PROCESS
from kvtier.store.format.block_file import BlockFile
from kvtier.store.reading import load as restore_module
from tests.support.stores import (
    DAMAGES,
    DIM,
    HEADS,
    LAYERS,
    ROOT,
    block_files,
    commit,
    count,
    damage,
    restored_length,
    same_bits,
    truth,
)


@pytest.fixture(params=["ram", "raw", "zstd"])
def store(request, tmp_path):
    """A store of 18 tokens in blocks of 4, in RAM or on disk."""
    if request.param == "ram":
        with PrefixStore(block_size=4) as store:
            commit(store, count(18))
            yield store
        return
    with PrefixStore(tmp_path, block_size=4, compression=request.param) as store:
        commit(store, count(18))
    with PrefixStore(tmp_path, block_size=4, compression=request.param) as store:
        yield store


def before_landing(patch, then):
    """Let each page of a file call ``then(file, layer)`` before it is read into its place."""
    prepare = BlockFile.landing

    def landing(self, layer, *where, **how):
        land = prepare(self, layer, *where, **how)

        def then_land():
            then(self, layer)
            land()

        return then_land

    patch.setattr(BlockFile, "landing", landing)


def empty_buffers(rows, columns):
    return [tuple(torch.zeros(rows, HEADS, columns, DIM) for _ in "kv") for _ in range(LAYERS)]


def test_rows_restore_different_parts_of_the_same_blocks(store):
    """Row 0 is padded by 3 columns and wants tokens 0..18, row 1 by 5 and wants 6..13."""
    match = store.match(ROOT, count(18))
    buffers = empty_buffers(2, 25)
    pads = (3, 5)
    restore = store.restore([match.between(0, 18), match.between(6, 13)])
    restore.start(lambda layer, row: (PageView.on(*(t[row, :, pads[row] :] for t in buffers[layer])), 0))
    for layer, (k_bhtd, v_bhtd) in enumerate(buffers):
        restore.wait(layer)
        expected = truth(ROOT, count(18), 0, 18)[layer]
        for ours, theirs in ((k_bhtd, expected.k_htd), (v_bhtd, expected.v_htd)):
            assert same_bits(ours[0, :, 3:21], theirs)
            assert same_bits(ours[1, :, 11:18], theirs[:, 6:13])
            assert not ours[0, :, :3].any()
            assert not ours[0, :, 21:].any()
            assert not ours[1, :, :11].any()
            assert not ours[1, :, 18:].any()
    assert restore.nbytes == (18 + 7) * LAYERS * 2 * HEADS * DIM * 4
    restore.close()


def test_spans_are_cut_at_both_ends(store):
    match = store.match(ROOT, count(18))
    assert match.length == 18
    for begin in range(19):
        for end in range(19):
            spans = match.between(begin, end)
            covered = [span.block.tokens[i] for span in spans for i in range(span.first, span.last)]
            assert covered == list(range(begin, end))
            assert [span.start for span in spans] == sorted(span.start for span in spans)


def test_rejected_blocks_are_not_matched_again_at_once(store, caplog):
    match = store.match(ROOT, count(18))
    restore = store.restore([match.spans])
    assert isinstance(restore.reject("not of this model"), RestoreError)
    restore.close()
    assert store.match(ROOT, count(18)).length == 0


def test_failed_page_read_is_raised_when_its_layer_is_waited_for(tmp_path, monkeypatch, caplog):
    with PrefixStore(tmp_path, block_size=4) as store:
        commit(store, count(8))
    landed = threading.Event()

    def scratch(file, layer):
        if layer == 1:
            assert landed.wait(timeout=30)
            raise BlockError("the platter is scratched")

    before_landing(monkeypatch, scratch)
    with PrefixStore(tmp_path, block_size=4) as store:
        buffers = empty_buffers(1, 8)
        restore = store.restore([store.match(ROOT, count(8)).spans])
        restore.start(lambda layer, row: (PageView.on(*(t[row] for t in buffers[layer])), 0))
        restore.wait(0)
        landed.set()
        with pytest.raises(RestoreError, match="scratched"):
            restore.wait(1)
        restore.close()
        assert store.match(ROOT, count(8)).length < 8
    assert len(caplog.records) == 1


@pytest.mark.parametrize("how", DAMAGES)
def test_restore_reports_all_unopenable_blocks_at_once(tmp_path, caplog, how):
    with PrefixStore(tmp_path, block_size=4) as store:
        commit(store, count(20))
    files = {path.stem: path for path in block_files(tmp_path)}
    with PrefixStore(tmp_path, block_size=4, host_budget=1) as store:
        spans = store.match(ROOT, count(20)).spans
        for index in (1, 2, 4):
            damage(files[spans[index].block.key], how, at=30)
        with pytest.raises(BlockError) as raised:
            store.restore([spans])
        assert files[spans[1].block.key].name in str(raised.value)
        assert str(raised.value).endswith("(and 2 more)")
        assert restored_length(store, count(20)) == 4
        assert commit(store, count(20)) == 12  # the damaged blocks and no others
        store.flush()
        assert restored_length(store, count(20)) == 20
    assert [record.getMessage()[:49] for record in caplog.records] == [
        "3 stored blocks cannot be used and were removed: "
    ]


def test_restore_reports_all_blocks_with_failed_pages_at_once(tmp_path, monkeypatch, caplog):
    """Pages fail in two layers; the second is still unread when the first is known to have failed."""
    with PrefixStore(tmp_path, block_size=4) as store:
        commit(store, count(20))
    wait, waiting = restore_module.wait, threading.Event()

    def wait_for_all(layers, seconds):
        waiting.set()
        return wait(layers, seconds)

    with PrefixStore(tmp_path, block_size=4, host_budget=1) as store:
        spans = store.match(ROOT, count(20)).spans
        bad = {(spans[i].block.key, layer) for i, layer in ((3, 0), (2, 0), (1, LAYERS - 1))}

        def scratch(file, layer):
            if layer == LAYERS - 1:
                assert waiting.wait(timeout=30)
            if (file.id.key, layer) in bad:
                raise BlockError(f"{file.path} is scratched")

        with monkeypatch.context() as patched:
            before_landing(patched, scratch)
            patched.setattr(restore_module, "wait", wait_for_all)
            buffers = empty_buffers(1, 20)
            restore = store.restore([spans])
            restore.start(lambda layer, row: (PageView.on(*(t[row] for t in buffers[layer])), 0))
            with pytest.raises(RestoreError, match=rf"{spans[1].block.key}.* is scratched \(and 2 more\)"):
                restore.wait(0)
            restore.close()
        assert restored_length(store, count(20)) == 4
        assert commit(store, count(20)) == 12
        store.flush()
        assert restored_length(store, count(20)) == 20
    assert len(caplog.records) == 1


def test_failed_read_is_recorded_even_if_no_layer_is_waited_for(tmp_path, monkeypatch, caplog):
    with PrefixStore(tmp_path, block_size=4) as store:
        commit(store, count(8))

    def scratch(file, layer):
        raise BlockError("the platter is scratched")

    with PrefixStore(tmp_path, block_size=4) as store:
        with monkeypatch.context() as patched:
            before_landing(patched, scratch)
            buffers = empty_buffers(1, 8)
            restore = store.restore([store.match(ROOT, count(8)).spans])
            restore.start(lambda layer, row: (PageView.on(*(t[row] for t in buffers[layer])), 0))
            restore.give_head_start(30)
            restore.close()
        assert store.match(ROOT, count(8)).length == 0
    assert len(caplog.records) == 1


def test_block_committed_after_a_failure_survives_a_second_failure(tmp_path, monkeypatch):
    """A block committed afterwards under the key of a damaged block is good and stays."""
    with PrefixStore(tmp_path, block_size=4) as store:
        commit(store, count(8))

    def scratch(file, layer):
        raise BlockError("the platter is scratched")

    with PrefixStore(tmp_path, block_size=4) as store:
        before_landing(monkeypatch, scratch)
        buffers = empty_buffers(1, 8)
        restore = store.restore([store.match(ROOT, count(8)).spans])
        restore.start(lambda layer, row: (PageView.on(*(t[row] for t in buffers[layer])), 0))
        with pytest.raises(RestoreError):
            restore.wait(0)
        assert commit(store, count(8)) == 8
        with pytest.raises(RestoreError):
            restore.wait(1)
        restore.close()
        assert store.match(ROOT, count(8)).length == 8


def test_page_that_comes_in_pieces_lands_whole(tmp_path, monkeypatch):
    """A system call may return fewer bytes than asked for."""
    with PrefixStore(tmp_path, block_size=4, compression="raw") as store:
        commit(store, count(18))
    read = os.preadv
    with PrefixStore(tmp_path, block_size=4, compression="raw") as store:
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:24]], offset))
        assert restored_length(store, count(18)) == 18


def test_no_page_lands_after_a_restore_is_closed(tmp_path, monkeypatch):
    with PrefixStore(tmp_path, block_size=4) as store:
        commit(store, count(8))
    reading, go, landed, open_before = threading.Event(), threading.Event(), [], len(OF_THIS_PROCESS)

    def wait(file, layer):
        reading.set()
        assert go.wait(timeout=30)
        landed.append(layer)

    before_landing(monkeypatch, wait)
    with PrefixStore(tmp_path, block_size=4) as store:
        buffers = empty_buffers(1, 8)
        restore = store.restore([store.match(ROOT, count(8)).spans])
        restore.start(lambda layer, row: (PageView.on(*(t[row] for t in buffers[layer])), 0))
        assert reading.wait(timeout=30)
        closing = threading.Thread(target=restore.close)
        closing.start()
        go.set()
        closing.join(timeout=30)
        assert not closing.is_alive()
        after_close = len(landed)
        store.flush()
        assert len(landed) == after_close
        assert len(OF_THIS_PROCESS) == open_before


@pytest.mark.parametrize("end", ["wait", "close"])
@pytest.mark.parametrize("readers", [1, 2], ids=["alone", "shared"])
def test_child_forked_during_a_restore_reads_its_own_pages(tmp_path, monkeypatch, end, readers):
    """The threads that the parent waits for do not exist in the child."""
    with PrefixStore(tmp_path, block_size=4) as store:
        commit(store, count(18))
    read, parent = os.preadv, os.getpid()
    blocked, go = threading.Event(), threading.Event()

    def slow(*args):
        if os.getpid() == parent and threading.current_thread() is not threading.main_thread():
            blocked.set()
            go.wait(timeout=60)
        return read(*args)

    with PrefixStore(tmp_path, block_size=4, host_budget=1) as store:
        buffers = [empty_buffers(1, 18) for _ in range(readers)]
        restores = [store.restore([store.match(ROOT, count(18)).spans]) for _ in buffers]
        monkeypatch.setattr(os, "preadv", slow)
        for own, restore in zip(buffers, restores, strict=True):
            restore.start(lambda layer, row, own=own: (PageView.on(*(t[row] for t in own[layer])), 0))
        assert blocked.wait(timeout=60)
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # ends a child that hangs
            right = True
            for own, restore in zip(buffers, restores, strict=True):
                for layer, expected in enumerate(truth(ROOT, count(18), 0, 18)) if end == "wait" else ():
                    restore.wait(layer)
                    right = right and same_bits(own[layer][0][0], expected.k_htd)
                restore.close()
            os._exit(0 if right else 1)
        _, status = os.waitpid(pid, 0)
        go.set()
        assert os.waitstatus_to_exitcode(status) == 0
        for restore in restores:
            restore.close()
