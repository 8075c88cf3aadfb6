"""Promise 4, call by call: each call of a store to its drive or to SQLite fails once, or from there on.

A life makes several hundred calls. ``KVTIER_FAULT_STRIDE=1`` lets each of them fail; by default every 83rd call
fails, from a different first call in each test; 83 shares no divisor with the number of drive errors.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kvtier import PrefixStore, StoreError
from kvtier.testing.faults import DISK_ERRORS, Deed, Fault, Faults, FaultyFilesystem
from tests.support import crashes, drive_faults
from tests.support.crashes import assert_sound, bytes_on_drive
from tests.support.drive_faults import AFTERWARDS, CHAINS, faulty_database, life, manage, opened, settings, use
from tests.support.stores import (
    block_files,
    commit,
    count,
    damage,
    restored_length,
    restored_length_at_last,
    run_python,
)

STRIDE = int(os.environ.get("KVTIER_FAULT_STRIDE", "83"))
SECONDS_A_POINT = 10


@pytest.fixture(autouse=True, scope="module")
def _no_power_cuts():
    """No power fails here except in the tests of power cuts: waiting for the drive would only cost time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture
def place():
    with crashes.quick_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def points():
    """All calls of a whole life, by budget, in order from the first call."""

    def met(room):
        faults = Faults()
        with faulty_database(faults), crashes.quick_folder() as folder:
            life(folder / "store", faults, room)
        return list(faults.met)

    return {room: met(room) for room in drive_faults.BUDGETS}


def test_a_whole_life_makes_every_kind_of_call(points):
    for room, met in points.items():
        calls = {call for call, _ in met}
        assert calls == {"open", "write", "fsync", "rename", "unlink", "mkdir", "statement"}, room
        assert sum(subject.startswith("COMMIT") for call, subject in met if call == "statement") > 10


def go_wrong(folder: Path, room: str, fault: Fault, warned) -> None:
    """Live with ``fault``, then on a repaired drive, then once more from the start."""
    faults = Faults(fault)
    with faulty_database(faults):
        try:
            store = opened(folder, FaultyFilesystem(faults), room)
        except StoreError as error:
            said = [str(error)]
        else:
            with store:
                use(store)
                said = manage(store)
                faults.plan()
                commit(store, AFTERWARDS)
                store.flush()
                restored_length_at_last(store, AFTERWARDS)
        assert all(len(text) > 20 for text in said), "an error says what is wrong"
        faults.plan()
        assert bytes_on_drive(folder) <= drive_faults.BUDGETS[room]
        texts = warned()
        assert len(texts) == len(set(texts)) <= 4, "each thing that goes wrong is told once"
    with PrefixStore(folder, **settings(room)) as store:
        assert_sound(store)
        for named in store.names():  # names that could not be unpinned would leave no room
            store.unname(named.name)
        use(store)
        commit(store, AFTERWARDS)
        store.flush()
        assert restored_length(store, AFTERWARDS) == len(AFTERWARDS)
        if room == "roomy":
            assert [restored_length(store, tokens) for tokens in CHAINS] == [len(tokens) for tokens in CHAINS]
        assert_sound(store)
        assert warned() == []


@pytest.mark.sample(1)  # of 4
@pytest.mark.parametrize("room", drive_faults.BUDGETS)
@pytest.mark.parametrize("times", [1, None], ids=["once", "from then on"])
def test_store_survives_a_drive_error_at_any_call(place, points, warned, room, times):
    """The number of a point selects its drive error; five consecutive points get all errors."""
    first = 1 + (len(room) + (times or 0)) % STRIDE
    for n in range(first, len(points[room]) + 1, STRIDE):
        call, subject = points[room][n - 1]
        error = DISK_ERRORS[n % len(DISK_ERRORS)]
        try:
            go_wrong(place / str(n), room, Fault(Deed.FAIL, at=n, times=times, error=error), warned)
        except Exception as problem:
            raise AssertionError(f"{errno.errorcode[error]} at point {n}: {call} {subject}") from problem


KILLED = """
import os, sys
from tests.support import crashes, drive_faults
from pathlib import Path
from tests.support.crashes import ended, fork
from kvtier.testing.faults import Deed, Fault, Faults, FaultyFilesystem

os.fsync = lambda fd: None  # a killed process is no power cut: what was written is there

def live(folder, room, fault):
    faults = Faults(fault)
    with drive_faults.faulty_database(faults):
        drive_faults.life(folder, faults, room)

room, points, stride, wrong = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), 0
for n in range(1 + len(room) % stride, points + 1, stride):
    folder = Path(sys.argv[1]) / str(n)
    code = ended(fork(live, folder, room, Fault(Deed.KILL, at=n)))
    assert code == -9 or n > points - 3, (n, code)  # the order of what two threads do may differ by a call
    if ended(fork(crashes.look, folder, drive_faults.settings(room), crashes.Told())):
        print("killed at point", n, file=sys.stderr)
        wrong += 1
sys.exit(wrong > 0)
"""


@pytest.mark.sample(2, of="kills and races")  # of 7
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes end in other ways here")
@pytest.mark.parametrize("room", drive_faults.BUDGETS)
def test_store_survives_a_process_killed_at_any_call(place, points, room):
    done = run_python(
        KILLED,
        *(place, room, len(points[room]), STRIDE),
        timeout_seconds=60 + SECONDS_A_POINT * len(points[room]) / STRIDE,
    )
    assert done.returncode == 0, done.stderr


def test_short_writes_leave_a_sound_store(tmp_path):
    drive = FaultyFilesystem(Faults(Fault(Deed.SHORT, call="write", times=None)))
    with opened(tmp_path, drive, "roomy") as store:
        use(store)
        assert [restored_length(store, tokens) for tokens in CHAINS] == [len(tokens) for tokens in CHAINS]
        assert_sound(store)


def test_file_that_cannot_be_deleted_counts_but_does_not_stop_eviction(tmp_path, warned):
    """Its bytes count for as long as it exists."""
    drive = FaultyFilesystem(Faults())
    with opened(tmp_path, drive, "tight") as store:
        first = count(3)
        commit(store, first)
        store.flush()
        (stuck,) = block_files(tmp_path)
        drive.faults.plan(Fault(Deed.FAIL, call="unlink", subject=f"*{stuck.name}", times=None, error=errno.EACCES))
        for n in range(1, 20):
            tokens = count(3, first=100 * n)
            commit(store, tokens)
            store.flush()
            assert restored_length(store, tokens) == 3
            assert stuck.exists()
            assert bytes_on_drive(tmp_path) <= drive_faults.BUDGETS["tight"]
        assert restored_length(store, first) == 0
        assert len(block_files(tmp_path)) == 5
        assert store.stats().errors["delete"] >= 1
        assert len(warned()) == 1
        drive.faults.plan()
    with opened(tmp_path, drive, "tight") as store:
        assert not stuck.exists()
        assert_sound(store)


@pytest.mark.parametrize("how", ["at once", "at last"])
@pytest.mark.parametrize("durability", ["lazy", "full"])
def test_power_cut_loses_blocks_only_without_full_durability(tmp_path, warned, durability, how):
    drive = FaultyFilesystem(Faults())
    if how == "at once":
        drive.faults.plan(Fault(Deed.LOSE, call="rename", subject="*.safetensors", times=None))
    with opened(tmp_path, drive, "roomy", durability) as store:
        for tokens in CHAINS:
            commit(store, tokens)
        store.flush()
        lost = drive.calls.cut_power() if how == "at last" else []
    files = sorted(path for path in block_files(tmp_path) if path.stat().st_size == 0)
    if durability == "full":
        assert files == lost == []
    else:
        assert files
    with PrefixStore(tmp_path, **settings("roomy")) as store:
        known = [restored_length_at_last(store, tokens) for tokens in CHAINS]
        assert known == ([0] * len(CHAINS) if durability == "lazy" else [len(tokens) for tokens in CHAINS])
        assert len(warned()) == (1 if durability == "lazy" else 0) * len({tokens[0] for tokens in CHAINS})
        store.verify(repair=True)
        assert_sound(store)
        use(store)
        assert [restored_length(store, tokens) for tokens in CHAINS] == [len(tokens) for tokens in CHAINS]
        assert_sound(store)


def test_catalog_damage_found_only_by_verify_leads_to_a_rebuild(tmp_path, warned):
    with PrefixStore(tmp_path, **settings("roomy")) as store:
        use(store)
    damage(tmp_path / "catalog.sqlite", "flip", 37)  # the count of its free pages, which is never used
    with PrefixStore(tmp_path, **settings("roomy")) as store:
        assert [problem.kind for problem in store.verify().problems] == ["catalog"]
        assert not store.verify(repair=True).ok
    assert warned() == []
    with PrefixStore(tmp_path, **settings("roomy")) as store:
        assert len(warned()) == 1
        assert_sound(store)
        assert [restored_length(store, tokens) for tokens in CHAINS] == [len(tokens) for tokens in CHAINS]
