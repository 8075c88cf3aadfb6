"""The SQLite database of a store shared with other processes; a second connection stands for each of them."""

import gc
import sqlite3
import threading
from contextlib import closing, contextmanager

import pytest

from kvtier import PrefixStore, StoreError
from kvtier.store.eviction import LeastRecentlyUsed
from kvtier.store.tiers.disk.catalog.blocks import Catalog
from kvtier.store.tiers.disk.catalog.connection import LOCKED_SECONDS, connect
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.testing.faults import Deed, Fault, Faults
from tests.support.stores import block, commit, count, restored_length

PATIENCE_SECONDS = 0.01


def impatient(uri, seconds):
    return connect(uri, PATIENCE_SECONDS)


@contextmanager
def another_process_writes(path):
    """Hold the write lock, like a process that is stopped in the middle of a change."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "catalog.sqlite"


def new_database(path, make_connection=impatient):
    return closing(Database(path, make_connection=make_connection))


def boot(database, name="next"):
    return Catalog(database, LeastRecentlyUsed(), lambda: 0.0).begin_boot(name)


def opened(folder, **more):
    return PrefixStore(
        folder, **{"block_size": 4, "host_budget": 1, "free_space_floor": 0, "connect": impatient, **more}
    )


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("kvtier") and r.levelname == "WARNING"]


class Closable(sqlite3.Connection):
    is_closed = False

    def close(self):
        self.is_closed = True
        super().close()


def test_connections_of_a_database_that_was_not_closed_are_closed_with_it(path):
    made = []

    def noting(uri, seconds):
        made.append(
            sqlite3.connect(
                uri, uri=True, timeout=seconds, isolation_level=None, check_same_thread=False, factory=Closable
            )
        )
        return made[-1]

    database = Database(path, make_connection=noting)
    with database.reading() as connection:
        connection.execute("SELECT count(*) FROM blocks").fetchone()
    assert len(made) == 2
    del database, connection
    gc.collect()
    assert [each.is_closed for each in made] == [True, True]


def test_change_that_cannot_be_rolled_back_blocks_no_later_one(path):
    faults = Faults()
    with new_database(path, faults.connect) as database:
        faults.plan(*(Fault(Deed.FAIL, subject=text) for text in ("DELETE*", "ROLLBACK")))
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"), database.transaction() as connection:
            connection.execute("DELETE FROM blocks")
        with another_process_writes(path):
            pass
        with database.transaction() as connection:
            connection.execute("DELETE FROM blocks")


def test_both_connections_are_opened_with_the_lock_timeout(path):
    asked = []

    def noting(uri, seconds):
        asked.append(seconds)
        return connect(uri, seconds)

    with new_database(path, noting) as database, database.reading():
        assert asked == [LOCKED_SECONDS] * 2


def test_query_does_not_wait_for_a_thread_in_a_transaction(path):
    """That thread may itself be waiting for another process."""
    with new_database(path) as database:
        changing, done = threading.Event(), threading.Event()

        def change():
            with database.transaction() as connection:
                connection.execute("UPDATE total SET boot = 'changed'")
                changing.set()
                done.wait(timeout=60)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            assert changing.wait(timeout=60)
            asked = threading.Thread(target=lambda: ask(database, answers))
            answers = []
            asked.start()
            asked.join(timeout=60)
            assert answers == [""]
        finally:
            done.set()
            thread.join()
        ask(database, answers)
        assert answers == ["", "changed"]


def ask(database, answers):
    with database.reading() as connection:
        answers += connection.execute("SELECT boot FROM total").fetchone()


@pytest.mark.parametrize("settings", [{}, {"exclusive": True}, None])
def test_query_inside_a_transaction_sees_its_changes(path, settings):
    database = Database(None) if settings is None else Database(path, **settings)
    with closing(database), database.transaction() as connection:
        connection.execute("UPDATE total SET boot = 'changed'")
        with database.reading() as again:
            assert again.execute("SELECT boot FROM total").fetchone() == ("changed",)


def test_query_connection_is_read_only(path):
    with new_database(path) as database, database.reading() as connection, pytest.raises(sqlite3.OperationalError):
        connection.execute("UPDATE total SET boot = 'changed'")


def test_after_a_lock_timeout_changes_do_not_wait_until_one_succeeds(path):
    faults = Faults()
    faulty = faults.connect

    def noting(uri, seconds):
        return faulty(uri, PATIENCE_SECONDS)

    def waits():
        return [said.partition("=")[2] for _, said in faults.met if said.startswith("PRAGMA busy_timeout=")]

    with new_database(path, noting) as database:
        with another_process_writes(path):
            for _ in range(3):
                with pytest.raises(sqlite3.OperationalError, match="locked"):
                    boot(database)
            assert waits() == ["0"]
        boot(database)
        assert waits() == ["0", f"{1000 * PATIENCE_SECONDS:.0f}"]


def test_reopened_connection_keeps_the_lock_timeout_of_the_closed_one(path):
    with new_database(path) as database:
        with another_process_writes(path), pytest.raises(sqlite3.OperationalError, match="locked"):
            boot(database)
        database.before_fork()
        database.after_fork(in_child=False)
        with database.transaction() as connection:
            assert connection.execute("PRAGMA busy_timeout").fetchone() == (0,)
        with database.transaction() as connection:
            assert connection.execute("PRAGMA busy_timeout").fetchone() == (10,)


def test_fork_closes_both_connections_and_queries_wait_until_it_ends(path):
    made = []

    def keeping(uri, seconds):
        made.append(connect(uri, seconds))
        return made[-1]

    with new_database(path, keeping) as database:
        with database.reading():
            pass
        database.before_fork()
        try:
            for connection in made:
                with pytest.raises(sqlite3.ProgrammingError, match="closed"):
                    connection.execute("SELECT 1")
            asked = threading.Thread(target=ask, args=(database, []))
            asked.start()
            asked.join(timeout=0.01)
            assert asked.is_alive()
        finally:
            database.after_fork(in_child=False)
        asked.join(timeout=60)
        assert not asked.is_alive()


def test_both_connections_switch_to_a_file_that_replaces_the_catalog(path, tmp_path):
    with new_database(tmp_path / "other.sqlite") as other:
        boot(other, "other")
    with new_database(path) as database:
        assert not boot(database, "first")
        for suffix in ("-wal", "-shm", ""):
            (tmp_path / f"catalog.sqlite{suffix}").unlink()
        (tmp_path / "other.sqlite").rename(path)
        answers = []
        ask(database, answers)
        with database.transaction() as connection:
            answers += connection.execute("SELECT boot FROM total").fetchone()
        assert answers == ["other", "other"]


# --- stores -----------------------------------------------------------------------------------------------------------


def test_store_opens_and_restores_while_another_process_locks_its_catalog(tmp_path, caplog):
    with opened(tmp_path, ttl=1000.0) as store:
        commit(store, count(8))
    with another_process_writes(tmp_path / "catalog.sqlite"), opened(tmp_path, ttl=1000.0) as store:
        assert restored_length(store, count(8)) == 8
    assert warnings(caplog) == []
    with opened(tmp_path) as store:
        assert restored_length(store, count(8)) == 8, "the catalog is the same"


def test_store_that_must_write_does_not_open_while_its_catalog_is_locked(tmp_path, monkeypatch, caplog):
    with opened(tmp_path) as store:
        commit(store, count(8))
    monkeypatch.setattr("kvtier.store.tiers.disk.recovery.boot_id", lambda: "another boot")
    with another_process_writes(tmp_path / "catalog.sqlite"), pytest.raises(StoreError, match="locked"):
        opened(tmp_path)
    assert not (tmp_path / "catalog.damaged").exists()
    with opened(tmp_path) as store:
        assert restored_length(store, count(8)) == 8
    assert warnings(caplog) == []


def test_cleanup_after_a_dead_process_waits_for_an_open_that_can_write(tmp_path, caplog):
    new = block(count(4))
    with opened(tmp_path) as store:
        commit(store, count(8, first=50))
        with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as dead, dead:
            dead.execute(f"UPDATE blocks SET state = 4, owner = '1-{'0' * 16}' WHERE children = 0")
    with another_process_writes(tmp_path / "catalog.sqlite"), opened(tmp_path) as store:
        assert restored_length(store, count(8, first=50)) == 4
        assert restored_length(store, new.id.tokens) == 0
    assert len(warnings(caplog)) == 1
    assert "cannot be put right yet" in warnings(caplog)[0]
    with opened(tmp_path) as store:
        assert store.stats().tiers[1].blocks == 1


def test_writes_pause_while_the_catalog_is_locked_and_resume_afterwards(tmp_path, caplog):
    now = [1000.0]
    with opened(tmp_path, clock=lambda: now[0]) as store:
        commit(store, count(4))
        store.flush()
        with another_process_writes(tmp_path / "catalog.sqlite"):
            for first in range(100, 140, 4):
                commit(store, count(4, first=first))
            commit(store, count(4))
            store.flush()
            assert restored_length(store, count(4)) == 4
            assert "another process holds the catalog" in store.stats().paused
            assert store.stats().errors["write"] == 1, "the rest was not tried"
        now[0] += 100.0
        commit(store, count(4, first=500))
        store.flush()
        assert store.stats().paused is None
        assert restored_length(store, count(4, first=500)) == 4
    assert not (tmp_path / "catalog.damaged").exists()
    assert len(warnings(caplog)) == 2, "one for what is kept, one for what is noted of its use"
