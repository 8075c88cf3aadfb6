"""Tables of the catalog, and checks of the values of rows.

``blocks`` has a row for each block: its state is one of ``block_states.State``, its ids are encoded by ``id_codes``, in
whose order siblings with the longest common prefix are neighbours; window blocks are marked. ``names`` and ``links``
hold named and pinned chains, ``ghosts`` recently evicted blocks. ``total`` is one row of sums, which triggers keep, so
that no query of a turn counts rows. All tables can be rebuilt from the files.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache, lru_cache

from kvtier.store.tiers.block_states import State
from kvtier.store.tiers.disk.catalog.connection import Statements

SCHEMA_VERSION = 7
UNPLACED = -1
"""The depth of a block whose ancestors do not all have rows yet, during a rebuild."""
_HERE = f"({State.WRITING:d}, {State.READY:d})"  # states of blocks whose parent must stay
_READY = f"state = {State.READY:d}"


def _sums(row: str) -> dict[str, str]:
    """Return, for each column of ``total``, the SQL for the share of the block ``row`` of a trigger."""
    is_ready, is_pinned = f"({row}.{_READY})", f"({row}.{_READY} AND {row}.pins > 0)"
    return {
        "bytes": f"{row}.bytes",
        "held_bytes": f"{row}.bytes * ({row}.state != {State.READY:d} OR {row}.pins > 0)",
        "blocks": f"({row}.key IS NOT NULL)",
        "ready": is_ready,
        "pinned": is_pinned,
    }


_ADD = ", ".join(f"{column} = {column} + {value}" for column, value in _sums("NEW").items())
_SUBTRACT = ", ".join(f"{column} = {column} - {value}" for column, value in _sums("OLD").items())
_CHANGE = ", ".join(
    f"{column} = {column} + {new} - {old}"
    for (column, new), old in zip(_sums("NEW").items(), _sums("OLD").values(), strict=True)
)
RECOUNT = (
    "UPDATE total SET (bytes, held_bytes, blocks, ready, pinned) = (SELECT "
    + ", ".join(f"COALESCE(SUM({value}), 0)" for value in _sums("blocks").values())
    + " FROM blocks)"
)
"""Counts all blocks anew."""
SCHEMA = f"""
CREATE TABLE blocks (
    key BLOB PRIMARY KEY, parent BLOB NOT NULL, root BLOB NOT NULL, state INTEGER NOT NULL, owner TEXT NOT NULL,
    tokens INTEGER NOT NULL, depth INTEGER NOT NULL, bytes INTEGER NOT NULL, children INTEGER NOT NULL,
    pins INTEGER NOT NULL, uses INTEGER NOT NULL, hits INTEGER NOT NULL, last_use INTEGER NOT NULL,
    queue INTEGER NOT NULL, priority REAL NOT NULL, note TEXT NOT NULL, used_at REAL NOT NULL,
    is_window INTEGER NOT NULL, ids BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX siblings ON blocks (parent, ids, is_window);
CREATE INDEX leaves ON blocks (queue, priority, key) WHERE {_READY} AND children = 0 AND pins = 0;
CREATE INDEX moving ON blocks (state) WHERE state != {State.READY:d};
CREATE INDEX by_use ON blocks (used_at) WHERE {_READY} AND pins = 0;
CREATE INDEX unplaced ON blocks (key) WHERE depth < 0;
CREATE TABLE names (
    name TEXT PRIMARY KEY, root BLOB NOT NULL, last BLOB NOT NULL, tokens INTEGER NOT NULL, pinned INTEGER NOT NULL,
    ttl REAL, created_at REAL NOT NULL, used_at REAL NOT NULL, expires_at REAL
) WITHOUT ROWID;
CREATE INDEX names_last ON names (last);
CREATE INDEX names_expire ON names (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE links (
    name TEXT NOT NULL, place INTEGER NOT NULL, key BLOB NOT NULL, pinned INTEGER NOT NULL, is_window INTEGER NOT NULL,
    PRIMARY KEY (name, place)
) WITHOUT ROWID;
CREATE INDEX links_key ON links (key);
CREATE INDEX pins ON links (key) WHERE pinned;
CREATE TABLE ghosts (
    key BLOB PRIMARY KEY, uses INTEGER NOT NULL, last_use INTEGER NOT NULL, note TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX ghosts_age ON ghosts (last_use);
CREATE TABLE total (
    id INTEGER PRIMARY KEY CHECK (id = 0), bytes INTEGER NOT NULL, held_bytes INTEGER NOT NULL,
    blocks INTEGER NOT NULL, ready INTEGER NOT NULL, pinned INTEGER NOT NULL, ghosts INTEGER NOT NULL,
    names INTEGER NOT NULL, policy TEXT NOT NULL, boot TEXT NOT NULL
);
INSERT INTO total VALUES (0, 0, 0, 0, 0, 0, 0, 0, '', '');
CREATE TRIGGER added AFTER INSERT ON blocks BEGIN
    UPDATE total SET {_ADD};
    UPDATE blocks SET children = children + 1 WHERE key = NEW.parent;
END;
CREATE TRIGGER removed AFTER DELETE ON blocks BEGIN
    UPDATE total SET {_SUBTRACT};
    UPDATE blocks SET children = children - 1 WHERE key = OLD.parent AND OLD.state IN {_HERE};
END;
CREATE TRIGGER changed AFTER UPDATE OF state, bytes, pins ON blocks BEGIN
    UPDATE total SET {_CHANGE};
END;
CREATE TRIGGER left AFTER UPDATE OF state ON blocks WHEN OLD.state IN {_HERE} AND NEW.state NOT IN {_HERE} BEGIN
    UPDATE blocks SET children = children - 1 WHERE key = NEW.parent;
END;
CREATE TRIGGER linked AFTER INSERT ON links WHEN NEW.pinned BEGIN
    UPDATE blocks SET pins = pins + 1 WHERE key = NEW.key;
END;
CREATE TRIGGER unlinked AFTER DELETE ON links WHEN OLD.pinned BEGIN
    UPDATE blocks SET pins = pins - 1 WHERE key = OLD.key;
END;
CREATE TRIGGER name_added AFTER INSERT ON names BEGIN
    UPDATE total SET names = names + 1;
END;
CREATE TRIGGER name_removed AFTER DELETE ON names BEGIN
    UPDATE total SET names = names - 1;
END;
CREATE TRIGGER ghost_added AFTER INSERT ON ghosts BEGIN
    UPDATE total SET ghosts = ghosts + 1;
END;
CREATE TRIGGER ghost_removed AFTER DELETE ON ghosts BEGIN
    UPDATE total SET ghosts = ghosts - 1;
END;
"""

_NUMBERS = ("tokens", "depth", "bytes", "children", "pins", "uses", "hits", "queue")
# Valid values, by the names of columns: flipped bits in the file can turn a value into anything.
_SOUND: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("key", "parent", "root", "last"), lambda value: isinstance(value, bytes) and len(value) == 32),
    "link": lambda value: value is None or (isinstance(value, bytes) and len(value) == 32),
    **dict.fromkeys(_NUMBERS, lambda value: type(value) is int),
    **dict.fromkeys(("used_at", "created_at"), lambda value: isinstance(value, (int, float))),
    "ids": lambda value: isinstance(value, bytes) and len(value) % 3 == 0,
    "is_window": lambda value: value in {0, 1},
    "state": lambda value: value in {State.WRITING, State.READY, State.LEAVING},
    **dict.fromkeys(("name", "note"), lambda value: isinstance(value, str)),
    "priority": lambda value: isinstance(value, float),
}


_Checks = tuple[tuple[int, str, Callable[[object], bool]], ...]


@lru_cache(maxsize=256)
def _checks_of(columns: tuple[tuple[str, ...], ...]) -> _Checks:
    """Return the place, the name and the test of each column that has a test."""
    named = ((place, column) for place, (column, *_) in enumerate(columns))
    return tuple((place, column, _SOUND[column]) for place, column in named if column in _SOUND)


class SoundRows:
    """The row factory of one connection: it returns rows whose values are valid.

    The tests of a statement are looked up once, not for each of its rows.
    """

    def __init__(self) -> None:
        self._columns: object = None  # a reference, so that no other description gets its address
        self._checks: _Checks = ()

    def __call__(self, cursor: sqlite3.Cursor, row: tuple[object, ...]) -> tuple[object, ...]:
        """Return ``row`` if its values are valid.

        Raises:
            sqlite3.DatabaseError: a value is not valid in its column.
        """
        columns = cursor.description
        if columns is not self._columns:
            self._columns, self._checks = columns, _checks_of(columns)
        for place, column, is_sound in self._checks:
            if not is_sound(row[place]):
                raise sqlite3.DatabaseError(f"database disk image is malformed: {row[place]!r:.40} as {column}")
        return row


def statements(script: str) -> Iterator[str]:
    """Split ``script`` into statements: ``executescript`` would commit an open transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


class OtherVersionError(sqlite3.DatabaseError):
    """The tables are those of another version of kvtier."""


def is_made(connection: Statements) -> bool:
    """Whether the tables of ``SCHEMA`` exist, and nothing else. In version 0 they are not filled yet.

    Triggers and views of a hostile file would run with every statement.

    Raises:
        OtherVersionError: they belong to another version.
        sqlite3.DatabaseError: other tables exist.
    """
    ours = _ours()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    found = connection.execute(f"{_OBJECTS} LIMIT ?", (len(ours) + 1,)).fetchall()
    if found and version not in (0, SCHEMA_VERSION):
        raise OtherVersionError(f"its tables are of version {version}, those of this kvtier of {SCHEMA_VERSION}")
    if found and (len(found) != len(ours) or set(found) != ours):
        raise sqlite3.DatabaseError("database disk image is malformed: its tables are not those of kvtier")
    return bool(found)


_OBJECTS = "SELECT type, name AS object, tbl_name, sql FROM sqlite_master"


@cache
def _ours() -> frozenset[tuple[str, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        return frozenset(connection.execute(_OBJECTS))
