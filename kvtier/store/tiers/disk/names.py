"""Names of prefixes: each refers to the chain of a conversation.

A name is a small file (the source of truth) and rows of the catalog (for fast lookups and for pins). It holds the keys
of its chain: blocks may come and go, the name stays until it is removed or expires.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from kvtier.errors import ConfigurationError, UnknownNameError
from kvtier.store.names import Name, checked_name, checked_ttl
from kvtier.store.tiers.disk.catalog.connection import Statements
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.store.tiers.disk.folder import StoreFolder, read_record
from kvtier.units import LONGEST_SECONDS

_OF_NAME = itemgetter(slice(8))
_MOST_TOKENS = 2**53
_MAX_FILE_BYTES = 64 * 2**20  # the keys of a chain of a million blocks


class Names:
    """The names of one store. Thread-safe; processes that share a folder see each other's names.

    Methods raise ``OSError`` and ``sqlite3.Error``, which the store translates. All but ``find`` raise
    ``UnknownNameError`` when the name that they are given does not exist.
    """

    def __init__(self, database: Database, folder: StoreFolder | None, clock: Callable[[], float]) -> None:
        self._database = database
        self._folder = folder
        self._clock = clock

    def assign(self, name: Name, used_at: float | None = None) -> None:
        """Give a chain a name; another chain that has the name loses it."""
        if self._folder is not None:
            self._folder.write_json(self._folder.name(name.name), asdict(name))
        with self._database.transaction() as connection:
            self._insert_rows(connection, name, self._clock() if used_at is None else used_at)

    def _insert_rows(self, connection: Statements, name: Name, used_at: float) -> None:
        links = [(bytes.fromhex(key), int(name.pinned), 0) for key in name.keys]
        links += [(bytes.fromhex(key), int(name.pinned), 1) for key in name.windows]
        old = connection.execute(
            "SELECT key, pinned, is_window FROM links WHERE name = ? ORDER BY place", (name.name,)
        ).fetchall()
        # A conversation is named again after each turn: rows of the unchanged start of its chain stay.
        kept = next((i for i, (a, b) in enumerate(zip(old, links, strict=False)) if a != b), min(len(old), len(links)))
        self._remove_rows(connection, name.name, kept)
        connection.execute(
            "INSERT INTO names VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                name.name,
                bytes.fromhex(name.root),
                bytes.fromhex(name.keys[-1] if name.keys else name.root),
                name.tokens,
                name.pinned,
                name.ttl_seconds,
                name.created_at,
                used_at,
                None if name.ttl_seconds is None else used_at + name.ttl_seconds,
            ),
        )
        connection.executemany(
            "INSERT INTO links VALUES (?, ?, ?, ?, ?)",
            [(name.name, place, *links[place]) for place in range(kept, len(links))],
        )

    def find(self, name: str) -> Name | None:
        """Return the record of ``name``; None when it does not exist."""
        found = self._rows("WHERE n.name = ?", (name,))
        return found[0][0] if found else None

    def get(self, name: str) -> Name:
        """Return the record of ``name``."""
        return self.details(name)[0]

    def details(self, name: str) -> tuple[Name, float, float | None]:
        """Return the record of ``name``, with the Unix times of its last use and of its expiry (None for never)."""
        found = self._rows("WHERE n.name = ?", (name,))
        if not found:
            raise UnknownNameError(f"nothing is called {name!r:.80} here; names() lists what has a name")
        return found[0]

    def all(self) -> list[tuple[Name, float, float | None]]:
        """Return every name, with the Unix times of its last use and of its expiry (None for never)."""
        return self._rows("", ())

    def _rows(self, which: str, values: tuple[object, ...]) -> list[tuple[Name, float, float | None]]:
        with self._database.reading(long=True) as connection:
            rows = connection.execute(
                "SELECT n.name, n.root, n.tokens, n.pinned, n.ttl, n.created_at, n.used_at, n.expires_at, "
                "l.key AS link, l.is_window AS of_window "
                f"FROM names AS n LEFT JOIN links AS l ON l.name = n.name {which} "
                "ORDER BY n.name, l.place",
                values,
            ).fetchall()
            found = []
            for (name, root, tokens, pinned, ttl, created_at, used_at, expires_at), links in groupby(rows, _OF_NAME):
                keys: tuple[list[str], list[str]] = ([], [])  # of the chain, and of window blocks
                for *_, link, of_window in links:
                    if link is not None:
                        keys[bool(of_window)].append(link.hex())
                chain, windows = map(tuple, keys)
                written = Name(name, root.hex(), chain, tokens, bool(pinned), ttl, created_at, windows)
                found.append((written, used_at, expires_at))
        return found

    def __len__(self) -> int:
        with self._database.reading() as connection:
            (count,) = connection.execute("SELECT names FROM total").fetchone()
        return int(count)

    def set_pinned(self, name: str, pinned: bool) -> None:
        """Pin or unpin the chain of ``name``."""
        written, used_at, _ = self.details(name)
        self.assign(replace(written, pinned=pinned), used_at)

    def rename(self, old: str, new: str) -> None:
        """Rename ``old`` to ``new``.

        Raises:
            UnknownNameError: ``old`` does not exist.
            ConfigurationError: ``new`` exists already.
        """
        written, used_at, _ = self.details(old)
        if self.find(new) is not None:
            raise ConfigurationError(f"{new!r} is the name of something else already; unname or forget that first.")
        self.assign(replace(written, name=new), used_at)
        self.remove(old)

    def remove(self, name: str) -> None:
        """Remove a name; its blocks become ordinary. Unknown names are ignored."""
        if self._folder is not None:
            self._folder.filesystem.delete(self._folder.name(name))
        with self._database.transaction() as connection:
            self._remove_rows(connection, name)

    @staticmethod
    def _remove_rows(connection: Statements, name: str, kept_links: int = 0) -> None:
        connection.execute("DELETE FROM names WHERE name = ?", (name,))
        connection.execute("DELETE FROM links WHERE name = ? AND place >= ?", (name, kept_links))

    def of_blocks(self, keys: Iterable[str]) -> set[str]:
        """Return the names whose chains, with the window blocks that end them, contain one of the blocks ``keys``."""
        found: set[str] = set()
        with self._database.reading() as connection:
            for key in keys:
                rows = connection.execute("SELECT name FROM links WHERE key = ?", (bytes.fromhex(key),))
                found.update(name for (name,) in rows)
        return found

    def blocks(self) -> set[str]:
        """Return the keys of all blocks of chains that have a name, and of the window blocks that end them."""
        with self._database.reading(long=True) as connection:
            return {key.hex() for (key,) in connection.execute("SELECT DISTINCT key FROM links")}

    def by_block(self) -> dict[str, list[str]]:
        """Return the names of each block that has some, in order."""
        found: dict[str, list[str]] = {}
        with self._database.reading(long=True) as connection:
            for key, name in connection.execute("SELECT DISTINCT key, name FROM links ORDER BY name"):
                found.setdefault(key.hex(), []).append(name)
        return found

    def pinned_blocks(self) -> set[str]:
        """Return the keys of all blocks that are pinned."""
        with self._database.reading(long=True) as connection:
            return {key.hex() for (key,) in connection.execute("SELECT key FROM links WHERE pinned")}

    def touched(self, keys: Sequence[str]) -> None:
        """Note that a turn used the blocks ``keys``: chains that end in one of them were used now."""
        if not len(self):
            return
        now = self._clock()
        with self._database.transaction() as connection:
            connection.executemany(
                "UPDATE names SET used_at = :now, expires_at = :now + ttl WHERE last = :key",
                [{"now": now, "key": bytes.fromhex(key)} for key in keys],
            )

    def replaced(self, old: str, new: str) -> None:
        """Replace block ``old`` by the longer block ``new``, which covers it, in the chains of all names."""
        for name in self.of_blocks([old]):
            for written, used_at, _ in self._rows("WHERE n.name = ?", (name,)):
                keys, windows = (
                    tuple(new if key == old else key for key in part) for part in (written.keys, written.windows)
                )
                self.assign(replace(written, keys=keys, windows=windows), used_at)

    def due(self) -> list[str]:
        """Return the expired names."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT name FROM names WHERE expires_at <= ?", (self._clock(),)).fetchall()
        return [name for (name,) in rows]

    def sync(self) -> list[tuple[Path, str]]:
        """Make the rows agree with the files; return unreadable files, each with its error."""
        if self._folder is None:
            return []
        damaged = []
        known = {self._folder.name(name.name): name for name, *_ in self.all()}
        files = self._folder.names()
        for path in files:
            try:
                name = _read(path)
                if self._folder.name(name.name) != path:
                    raise ValueError("it is the file of another name")
            except FileNotFoundError:
                continue
            except (OSError, ValueError, RecursionError) as error:
                damaged.append((path, str(error)))
                continue
            if known.get(path) != name:
                self._sync_rows(path, name.name)
        for path in known.keys() - set(files):
            self._sync_rows(path, known[path].name)
        return damaged

    def _sync_rows(self, path: Path, name: str) -> None:
        """Make the rows of ``name`` agree with its file, or remove them if there is none.

        A change of a name changes the file first and the rows after. So the file is read while no other process can
        change rows: this never undoes a recent change of another process.
        """
        with self._database.transaction() as connection:
            try:
                written, used_at = _read(path), path.stat().st_mtime
            except FileNotFoundError:
                self._remove_rows(connection, name)
            except (OSError, ValueError, RecursionError):
                return  # damaged since it was read: the next sync reports it
            else:
                self._insert_rows(connection, written, used_at)


def _read(path: Path) -> Name:
    """Read the file of a name.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no valid file of a name.
    """
    values = read_record(path, _MAX_FILE_BYTES)
    try:
        if isinstance(values["ttl_seconds"], str):  # people write durations, files seconds
            raise ValueError(f"its ttl_seconds {values['ttl_seconds']!r:.40} is no number")
        name = Name(
            checked_name(values["name"]),
            values["root"],
            tuple(values["keys"]),
            values["tokens"],
            values["pinned"],
            checked_ttl(values["ttl_seconds"]),
            values["created_at"],
            tuple(values.get("windows", ())),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no file of a name ({error!r})") from error
    keys = (name.root, *name.keys, *name.windows)
    keys_are_keys = all(isinstance(key, str) and len(bytes.fromhex(key)) == 32 for key in keys)
    is_time = type(name.created_at) in (int, float) and abs(name.created_at) < LONGEST_SECONDS  # NaN is not
    numbers = type(name.tokens) is int and 0 < name.tokens < _MOST_TOKENS and is_time
    if not (keys_are_keys and numbers and isinstance(name.pinned, bool)):
        raise ValueError("it is no file of a name")
    return name
