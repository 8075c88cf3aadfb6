"""Planned drive faults happen where they were planned, and nowhere else."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
from pathlib import Path

import pytest

from kvtier.testing.faults import CALLS, DISK_ERRORS, Deed, Fault, Faults, FaultyFilesystem

DATA = bytes(range(100))


@pytest.fixture
def drive():
    return FaultyFilesystem(Faults())


def put(drive: FaultyFilesystem, path: Path, durable: bool = True) -> None:
    drive.write_whole(path, [memoryview(DATA)], durable)


def test_calls_without_a_fault_succeed_and_are_recorded(tmp_path, drive):
    drive.make_folder(tmp_path / "a")
    put(drive, tmp_path / "a" / "file")
    drive.delete(tmp_path / "a" / "file")
    assert [call for call, _ in drive.faults.met] == [
        *("mkdir", "open", "write", "fsync", "rename", "open", "fsync", "unlink")
    ]
    assert drive.faults.met[0] == ("mkdir", str(tmp_path / "a"))
    assert drive.faults.met[4] == ("rename", str(tmp_path / "a" / "file"))


@pytest.mark.parametrize("code", DISK_ERRORS, ids=errno.errorcode.get)
def test_planned_fault_fails_exactly_one_call(tmp_path, drive, code):
    put(drive, tmp_path / "calls")
    for n, (call, _) in enumerate(list(drive.faults.met), 1):
        drive.faults.plan(Fault(Deed.FAIL, at=n, error=code))
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            put(drive, tmp_path / f"file {n}")
        assert caught.value.errno == code
        assert drive.faults.met[n - 1][0] == call
        put(drive, tmp_path / f"file {n}")  # the next call succeeds
        assert (tmp_path / f"file {n}").read_bytes() == DATA


def test_fault_after_the_call_raises_although_the_call_was_done(tmp_path, drive):
    drive.faults.plan(Fault(Deed.FAIL, call="rename", after=True))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        put(drive, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


def test_permanent_fault_hits_only_matching_calls_and_paths(tmp_path, drive):
    drive.faults.plan(Fault(Deed.FAIL, call="unlink", subject="*/stuck", times=None, error=errno.EACCES))
    for name in ("stuck", "other"):
        put(drive, tmp_path / name)
    for _ in range(3):
        with pytest.raises(PermissionError):
            drive.delete(tmp_path / "stuck")
    assert drive.delete(tmp_path / "other")
    drive.faults.plan()
    assert drive.delete(tmp_path / "stuck")


def test_fault_occurs_as_often_as_planned(tmp_path, drive):
    drive.faults.plan(Fault(Deed.FAIL, call="unlink", at=2, times=2))
    outcomes = []
    for _ in range(5):
        try:
            outcomes.append(drive.delete(tmp_path / "missing"))
        except OSError:
            outcomes.append("failed")
    assert outcomes == [False, "failed", "failed", False, False]


def test_short_writes_are_continued_until_the_file_is_complete(tmp_path, drive):
    drive.faults.plan(Fault(Deed.SHORT, call="write", times=None))
    put(drive, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    assert [call for call, _ in drive.faults.met].count("write") == 8  # 50 + 25 + 12 + 6 + 3 + 2 + 1 + 1


@pytest.mark.parametrize("after", [False, True])
def test_kill_fault_ends_the_process_before_or_after_the_call(tmp_path, drive, after):
    pid = os.fork()
    if pid == 0:
        drive.faults.plan(Fault(Deed.KILL, call="rename", after=after))
        try:
            put(drive, tmp_path / "file")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "file").exists() == after
    assert len(list(tmp_path.iterdir())) == 1  # the final or the temporary file


def test_lose_fault_drops_only_unsynced_data(tmp_path, drive):
    drive.faults.plan(Fault(Deed.LOSE, call="rename", times=None))
    put(drive, tmp_path / "lazy", durable=False)
    put(drive, tmp_path / "full", durable=True)
    assert (tmp_path / "lazy").read_bytes() == b""
    assert (tmp_path / "full").read_bytes() == DATA


def test_power_cut_truncates_only_unsynced_files(tmp_path, drive):
    for name in ("lazy", "gone", "full", "replaced"):
        put(drive, tmp_path / name, durable=name == "full")
    drive.delete(tmp_path / "gone")
    put(drive, tmp_path / "replaced", durable=True)
    assert drive.calls.cut_power(keep_bytes=10) == [tmp_path / "lazy"]
    assert (tmp_path / "lazy").read_bytes() == DATA[:10]
    assert (tmp_path / "full").read_bytes() == (tmp_path / "replaced").read_bytes() == DATA
    assert drive.calls.cut_power() == []


@pytest.mark.parametrize(
    ("code", "text"), [(errno.ENOSPC, "full"), (errno.EIO, "disk I/O"), (errno.EROFS, "readonly"), (99, "disk I/O")]
)
def test_planned_statement_faults_raise_sqlite_errors(tmp_path, code, text):
    faults = Faults()
    connection = faults.connect((tmp_path / "db").as_uri(), 1.0)
    try:
        connection.execute("CREATE TABLE t (a)")
        connection.executemany("INSERT INTO t VALUES (?)", [(1,), (2,)])
        connection.executescript("INSERT INTO t VALUES (3); INSERT INTO t VALUES (4);")
        assert [call for call, _ in faults.met] == ["statement"] * 3
        faults.plan(Fault(Deed.FAIL, subject="INSERT*", error=code))
        with pytest.raises(sqlite3.OperationalError, match=text):
            connection.executemany("INSERT INTO t VALUES (?)", [(5,)])
        faults.plan(Fault(Deed.FAIL, subject="COMMIT", error=code, after=True))
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (?)", (6,))
        with pytest.raises(sqlite3.OperationalError, match=text):
            connection.execute("COMMIT")
        assert [a for (a,) in connection.execute("SELECT a FROM t")] == [1, 2, 3, 4, 6]
    finally:
        connection.close()


def test_invalid_fault_is_rejected():
    with pytest.raises(ValueError, match=r"call='reanme' is none of open, write"):
        Fault(Deed.FAIL, call="reanme")
    with pytest.raises(ValueError, match="at=0 must be 1 or more"):
        Fault(Deed.FAIL, at=0)
    assert all(Fault(Deed.FAIL, call=call).fits(call, "anything") for call in CALLS)
