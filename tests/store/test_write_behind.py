"""Write-behind: delayed tail blocks, writing at the second use, and drives that hang."""

import itertools
import threading

import pytest

from kvtier import ConfigurationError, PrefixStore
from kvtier.store.write_behind import LONGEST_RESTS, WriteBehind
from tests.support.stores import ROOT, block, commit, count, restored_length, truth


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def behind(clock):
    behind = WriteBehind(10.0, lambda: None, clock)
    yield behind
    behind.close()


def wake(behind):
    """Make the writer thread look at the clock."""
    done = threading.Event()
    behind.submit(done.set)
    assert done.wait(30)
    behind.submit(lambda: None)


def test_tail_block_is_written_once_its_conversation_rests(behind, clock):
    written = threading.Event()
    behind.submit_at_rest("a", written.set, None)
    assert behind.waits("a")
    clock.now += 9.9
    wake(behind)
    assert not written.is_set()
    clock.now += 0.2
    wake(behind)
    assert written.wait(30)
    assert not behind.waits("a")
    assert behind.take_back("a") is None


def test_replaced_tail_block_is_not_written(behind, clock):
    written = []
    behind.submit_at_rest("a", lambda: written.append("a"), None)
    behind.submit_at_rest("b", lambda: written.append("b"), behind.take_back("a"))
    behind.flush()
    assert written == ["b"]


def test_tail_block_wait_is_bounded_while_turns_keep_coming(behind, clock):
    since, turns, written = None, 0, threading.Event()
    while not written.is_set():
        behind.submit_at_rest(str(turns), written.set, since)
        clock.now += 9.0
        wake(behind)
        behind.submit(lambda: None)
        since = behind.take_back(str(turns))
        turns += 1
        if since is None:
            assert written.wait(30)
    assert turns == -(-LONGEST_RESTS * 10 // 9)


def test_tail_block_is_queued_at_once_without_a_delay(clock):
    behind, gate = WriteBehind(0.0, lambda: None, clock), threading.Event()
    behind.submit_at_rest("a", gate.set, None)
    assert gate.wait(30)
    behind.close()


def test_close_writes_waiting_tail_blocks(clock):
    written = []
    behind = WriteBehind(10.0, lambda: None, clock)
    behind.submit_at_rest("a", lambda: written.append("a"), None)
    behind.close()
    assert written == ["a"]


# --- in a store -------------------------------------------------------------------------------------------------------


def chat(store, turns, tokens_each):
    """Commit a growing conversation; return the size of its K and V in bytes."""
    tokens = count(turns * tokens_each)
    for turn in range(1, turns + 1):
        ids = tokens[: turn * tokens_each]
        store.commit(ROOT, ids, lambda start, stop: truth(ROOT, tokens, start, stop))
    store.flush()
    assert restored_length(store, tokens) == len(tokens)
    return block(tokens).nbytes


@pytest.mark.parametrize(("turns", "tokens_each"), [(20, 3), (64, 1)])
def test_tail_delay_keeps_written_bytes_of_short_turns_low(tmp_path, turns, tokens_each):
    written = {}
    for delay in (0.0, 3600.0):
        with PrefixStore(tmp_path / str(delay), block_size=32, tail_delay=delay) as store:
            kept = chat(store, turns, tokens_each)
            headers = 2048 * len(list(store.path.rglob("*.safetensors")))
            written[delay] = store.stats().written_bytes
        with PrefixStore(tmp_path / str(delay), block_size=32) as store:
            assert restored_length(store, count(turns * tokens_each)) == turns * tokens_each
    assert written[3600.0] <= 1.5 * (kept + headers)
    assert written[0.0] > 3 * written[3600.0]


def test_flushed_tail_stays_on_disk_until_its_successor_is_written(tmp_path):
    with PrefixStore(tmp_path, block_size=8, tail_delay=3600) as store:
        commit(store, count(5))
        store.flush()
        commit(store, count(7))  # its tail block waits
        with PrefixStore(tmp_path, block_size=8) as other:
            assert restored_length(other, count(7)) == 5
        store.flush()
        with PrefixStore(tmp_path, block_size=8) as other:
            assert restored_length(other, count(7)) == 7


def test_recommitting_a_waiting_tail_block_does_not_write_it(tmp_path):
    """A waiting tail counts as known, so committing it again does not write it."""
    with PrefixStore(tmp_path, block_size=8, tail_delay=3600) as store:
        for _ in range(3):
            commit(store, count(13))
        done = threading.Event()
        store._behind.submit(done.set)
        assert done.wait(30)
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_name_keeps_its_tokens_when_its_waiting_tail_block_grows(tmp_path):
    with PrefixStore(tmp_path, block_size=8, tail_delay=3600) as store:
        commit(store, count(13))
        store.name("chat", ROOT, count(13))
        commit(store, count(14))
        commit(store, count(15))
        store.flush()
        assert store.named("chat").tokens == 13
    with PrefixStore(tmp_path, block_size=8) as store:
        assert list(store.tokens_of("chat")) == list(count(13))


def test_naming_a_prefix_ends_the_wait_of_its_tail_block(tmp_path):
    with PrefixStore(tmp_path, block_size=8, tail_delay=3600) as store:
        commit(store, count(13))
        store.name("chat", ROOT, count(13))
        assert not store._behind.waits(block(count(13)).id.key)


def test_ram_full_of_waiting_tail_blocks_accepts_and_keeps_more(tmp_path):
    """A block stays in RAM until it is written. A full RAM has its waiting tails written and goes on."""
    nbytes = block(count(7)).nbytes
    with PrefixStore(tmp_path, block_size=8, tail_delay=3600, host_budget=2 * nbytes) as store:
        for first in range(0, 1000, 100):
            tokens = count(7, first=first)
            assert commit(store, tokens) == 7
        store.flush()
        assert all(restored_length(store, count(7, first=first)) == 7 for first in range(0, 1000, 100))


# --- writing at the second use ----------------------------------------------------------------------------------------


def test_second_use_mode_does_not_write_a_prefix_used_once(tmp_path):
    with PrefixStore(tmp_path, block_size=8, write_on="second-use") as store:
        commit(store, count(20))
        commit(store, count(20, first=100))
        store.flush()
        assert store.stats().written_bytes == 0
        assert restored_length(store, count(20)) == 20  # from RAM
        commit(store, count(20))
        store.flush()
    with PrefixStore(tmp_path, block_size=8) as store:
        assert restored_length(store, count(20)) == 20
        assert restored_length(store, count(20, first=100)) == 0


def test_second_use_mode_writes_full_blocks_of_a_continued_conversation(tmp_path):
    with PrefixStore(tmp_path, block_size=8, write_on="second-use") as store:
        for length in (20, 30, 40):
            commit(store, count(length))
    with PrefixStore(tmp_path, block_size=8) as store:
        assert restored_length(store, count(40)) == 24  # full blocks that a second turn used


def test_second_use_mode_writes_named_and_imported_prefixes(tmp_path):
    with PrefixStore(tmp_path / "kv", block_size=8, write_on="second-use") as store:
        commit(store, count(20))
        store.name("kept", ROOT, count(20))
        store.export("kept", tmp_path / "file")
    with PrefixStore(tmp_path / "kv", block_size=8) as store:
        assert restored_length(store, count(20)) == 20
    with PrefixStore(tmp_path / "other", block_size=8, write_on="second-use", host_budget=1) as store:
        store.import_(tmp_path / "file")  # there is no RAM to keep it in
    with PrefixStore(tmp_path / "other", block_size=8) as store:
        assert restored_length(store, count(20)) == 20


@pytest.mark.parametrize(
    ("setting", "value"),
    [("tail_delay", v) for v in (-1, float("nan"), float("inf"), True, "10", None)]
    + [("write_on", v) for v in ("", "third-use", None, 2)],
)
def test_invalid_tail_delay_and_write_on_are_refused(tmp_path, setting, value):
    with pytest.raises(ConfigurationError, match=setting):
        PrefixStore(tmp_path, **{setting: value})


# --- a drive that hangs -----------------------------------------------------------------------------------------------


def test_hanging_drive_does_not_block_commits(tmp_path, caplog):
    """Its blocks stay in RAM and are written when a turn uses them after the drive recovers."""
    gate = threading.Event()
    with PrefixStore(tmp_path, block_size=4) as store:
        store._behind._writer._wait_seconds = 0.05
        store._behind.submit(gate.wait)
        for turn in itertools.count(1):
            commit(store, count(4 * turn))
            if store.stats().errors.get("write"):
                break
        assert restored_length(store, count(4 * turn)) == 4 * turn
        gate.set()
        store.flush()
        commit(store, count(4 * turn + 4))
        store.flush()
        assert not store._tiers.host._writing, "a block that nobody writes is never evicted"
        assert sum("hangs" in record.message for record in caplog.records) == 1
    with PrefixStore(tmp_path, block_size=4) as store:
        assert restored_length(store, count(4 * turn + 4)) == 4 * turn + 4


def test_hanging_drive_with_ram_full_of_unwritten_blocks_does_not_block_commits(tmp_path, caplog):
    gate, settings = threading.Event(), {"block_size": 4, "host_budget": 3 * block(count(4)).nbytes}
    with PrefixStore(tmp_path, **settings) as store:
        store._tiers.host._longest_wait_seconds = 0.05
        store._behind.submit(gate.wait)
        assert commit(store, count(40)) == 12
        gate.set()
        store.flush()
        store._tiers.host._longest_wait_seconds = 30.0
        assert restored_length(store, count(40)) == 12
        assert sum("hangs" in record.message for record in caplog.records) == 1
        assert commit(store, count(40)) == 28


# --- progress ---------------------------------------------------------------------------------------------------------


def test_flush_tells_the_bytes_of_all_queued_blocks_and_nothing_when_none_is_queued(tmp_path):
    events = []
    with PrefixStore(tmp_path, block_size=4) as store:
        tails = (count(3), count(2, 100))  # they wait for their conversations to rest
        for tokens in tails:
            commit(store, tokens)
        store.flush(progress=events.append)
        nbytes = sum(page.nbytes for tokens in tails for page in truth(ROOT, tokens, 0, len(tokens)))
        assert {(event.kind, event.unit, event.total) for event in events} == {("flush", "bytes", nbytes)}
        assert [event.done for event in events] == sorted(event.done for event in events)
        assert (events[0].done, events[-1].done, events[-1].ended) == (0, nbytes, True)
        events.clear()
        store.flush(progress=events.append)
        assert events == []


def test_flush_refuses_progress_of_another_type(tmp_path):
    with PrefixStore(tmp_path) as store, pytest.raises(ConfigurationError, match="progress='bars'"):
        store.flush(progress="bars")
