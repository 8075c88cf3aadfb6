"""Catalog: rows of the blocks of the disk tier, and every change of their state.

A row is prepared before its file appears, so that the byte budget counts it, and it stays until its file is gone.
Lookups find only ready rows. States and moves are those of ``block_states``; a move that a row cannot make changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from enum import Enum, auto

from kvtier.store.block import Entry
from kvtier.store.chain import BlockId, TokenIds, common_run
from kvtier.store.eviction.base import EvictionPolicy, SavedSeconds, nothing_known
from kvtier.store.tiers.block_states import Move, State, after
from kvtier.store.tiers.disk.catalog.adoption import Adoption
from kvtier.store.tiers.disk.catalog.connection import Statements
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.store.tiers.disk.catalog.id_codes import decode_ids, encode_ids
from kvtier.store.tiers.disk.catalog.ranking import Place, Session
from kvtier.store.tiers.disk.catalog.rows import batches, bytes_up_to, depth_after, insert, is_filled, move
from kvtier.store.tiers.disk.catalog.schema import RECOUNT

_KEYS_AT_ONCE = 500  # SQLite takes at least 999 values in a statement, and a transaction should be short
_PASSED_MOST = 64  # limit of unusable siblings between a sequence and its neighbour
_FOREVER = float("-inf")
_IDENTITY = "key, parent, root, ids"
_BEFORE, _AFTER = ("ids <= ?", "ids DESC"), ("ids > ?", "ids")  # which siblings, in which order
_READY = f"state = {State.READY:d}"
_FOUND = f"{_READY} AND (used_at >= ? OR pins > 0)"


class Prepared(Enum):
    """Outcome of preparing a store."""

    RESERVED = auto()
    """The caller writes the file, then completes or aborts the store."""
    PRESENT = auto()
    """The block is stored already."""
    ELSEWHERE = auto()
    """Another owner is writing it."""
    LEAVING = auto()
    """Its old file is being deleted."""
    ORPHAN = auto()
    """Its parent is not stored: lookups could never find it."""
    NO_ROOM = auto()
    """The budget has no room for it now."""


class _NotEnoughError(Exception):
    """Less can be evicted than is needed: the transaction is rolled back."""


class _RolledBackError(Exception):
    """A trial has ended: the transaction is rolled back."""


class Catalog:
    """The blocks of one store. Thread-safe, and shared by processes. Methods raise ``sqlite3.Error``.

    ``adopt`` and ``rebuild`` are those of ``Adoption``.
    """

    def __init__(
        self,
        database: Database,
        policy: EvictionPolicy,
        clock: Callable[[], float],
        saved_seconds: SavedSeconds = nothing_known,
    ) -> None:
        self._database = database
        self._policy = policy
        self._saved_seconds = saved_seconds
        self._clock = clock
        adoption = Adoption(database, policy, saved_seconds)
        self.adopt, self.rebuild = adoption.adopt, adoption.rebuild

    # --- finding ----------------------------------------------------------------------------------------------------

    def contains(self, key: str, since: float = _FOREVER) -> bool:
        """Whether a block is ready, and was used at ``since`` (Unix time) or later, or is pinned."""
        with self._database.reading() as connection:
            found = connection.execute(f"SELECT 1 FROM blocks WHERE key = ? AND {_FOUND}", (bytes.fromhex(key), since))
            return found.fetchone() is not None

    def ready(self, keys: Sequence[str], since: float = _FOREVER) -> set[str]:
        """Return the subset of ``keys`` for which ``contains`` is true."""
        return self._having(keys, _FOUND, since)

    def absent(self, keys: Sequence[str]) -> list[str]:
        """Return the subset of ``keys`` neither ready nor being written."""
        present = self._having(keys, f"state IN ({State.READY:d}, {State.WRITING:d})")
        return [key for key in keys if key not in present]

    def _having(self, keys: Sequence[str], condition: str, *values: float) -> set[str]:
        found: set[str] = set()
        with self._database.reading() as connection:
            for some in batches(keys, _KEYS_AT_ONCE):
                rows = connection.execute(
                    f"SELECT key FROM blocks WHERE key IN ({','.join('?' * len(some))}) AND {condition}",
                    [*map(bytes.fromhex, some), *values],
                )
                found.update(row[0].hex() for row in rows)
        return found

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a ready block."""
        found = self.find_all([key])
        return found[0] if found else None

    def find_all(self, keys: Iterable[str]) -> list[BlockId]:
        """Return the identities of the ready blocks among ``keys``, in any order."""
        found: list[BlockId] = []
        with self._database.reading() as connection:
            for some in batches(dict.fromkeys(keys), _KEYS_AT_ONCE):
                which = f"key IN ({','.join('?' * len(some))}) AND {_READY}"
                rows = connection.execute(f"SELECT {_IDENTITY} FROM blocks WHERE {which}", [*map(bytes.fromhex, some)])
                found += map(_block_id, rows)
        return found

    def nearest(
        self, parent: str, tokens: TokenIds, since: float = _FOREVER, *, windows: bool = False
    ) -> list[BlockId]:
        """Return the two blocks after ``parent`` that are beside ``tokens`` in the order of ids.

        Only window blocks count with ``windows``, and all others without. One of the two has the longest common prefix
        with ``tokens`` of all: in that order, the common prefix of two sequences can only shrink with the distance
        between them. Unusable blocks are skipped, up to a limit.
        """
        ids = encode_ids(tokens)
        with self._database.reading() as connection:
            found = [_neighbour(connection, parent, side, ids, since, windows) for side in (_BEFORE, _AFTER)]
        return [block for block in found if block is not None]

    def tails(self, parent: str, tokens: TokenIds) -> list[BlockId]:
        """Return the blocks after ``parent`` whose ids are a proper prefix of ``tokens``."""
        found: list[BlockId] = []
        longest = len(tokens) - 1  # no remaining block is longer
        with self._database.reading() as connection:
            while longest > 0:
                ids = encode_ids(tokens[:longest])
                block = _neighbour(connection, parent, _BEFORE, ids, _FOREVER)
                if block is None:
                    break
                shared = common_run(block.tokens, tokens)
                if shared == len(block.tokens):
                    rows = connection.execute(
                        f"SELECT {_IDENTITY} FROM blocks WHERE parent = ? AND ids = ? AND {_READY} LIMIT ?",
                        (bytes.fromhex(parent), encode_ids(block.tokens), _PASSED_MOST),
                    )
                    found += map(_block_id, rows)  # blocks of all kinds of the same ids
                    shared -= 1
                longest = min(shared, longest - 1)
        return found

    def entry(self, key: str) -> Entry | None:
        """Return the entry of a ready block."""
        found = self._entries("AND key = ?", bytes.fromhex(key))
        return found[0] if found else None

    def entries(self) -> list[Entry]:
        """Return the entries of all ready blocks."""
        return self._entries("", long=True)

    def entries_of(self, keys: Iterable[str]) -> list[Entry]:
        """Return the entries of the ready blocks among ``keys``."""
        found: list[Entry] = []
        for some in batches(dict.fromkeys(keys), _KEYS_AT_ONCE):
            which = f"AND key IN ({','.join('?' * len(some))})"
            found += self._entries(which, *map(bytes.fromhex, some), long=True)
        return found

    def linked_entries(self) -> list[Entry]:
        """Return the entries of the ready blocks of all named chains, and of those that have the same parents."""
        linked = "SELECT parent FROM blocks WHERE key IN (SELECT key FROM links)"
        return self._entries(f"AND parent IN ({linked})", long=True)

    def _entries(self, condition: str, *values: object, long: bool = False) -> list[Entry]:
        with self._database.reading(long=long) as connection:
            rows = connection.execute(f"SELECT {_ENTRY} FROM blocks WHERE {_READY} {condition}", values).fetchall()
        return [_entry(row) for row in rows]

    # --- storing ----------------------------------------------------------------------------------------------------

    def prepare_store(self, block: BlockId, nbytes: int, budget_bytes: int, owner: str) -> Prepared:
        """Reserve ``nbytes`` for ``block`` if all blocks then fit ``budget_bytes``; ``owner`` writes its file."""
        with self._database.transaction() as connection:
            row = connection.execute("SELECT state FROM blocks WHERE key = ?", (bytes.fromhex(block.key),)).fetchone()
            if row is not None:
                return _OUTCOMES[State(row[0])]
            depth = depth_after(connection, block)
            if depth is None:
                return Prepared.ORPHAN
            (total,) = connection.execute("SELECT bytes FROM total").fetchone()
            if total + nbytes > budget_bytes:
                return Prepared.NO_ROOM
            session = Session(self._policy, connection, self._saved_seconds)
            state = after(State.ABSENT, Move.PREPARE_STORE)
            insert(connection, session, block, depth, nbytes, state, owner, self._clock())
            session.end()
            return Prepared.RESERVED

    def complete_store(self, key: str, owner: str) -> bool:
        """Make a prepared block ready: its file is in place. Returns whether ``owner`` had prepared it."""
        with self._database.transaction() as connection:
            return move(connection, key, Move.COMPLETE_STORE, owner)

    def abort_store(self, key: str, owner: str) -> bool:
        """Remove the row of a prepared block. Returns whether ``owner`` had prepared it."""
        with self._database.transaction() as connection:
            return move(connection, key, Move.ABORT_STORE, owner)

    def writer(self, key: str) -> str | None:
        """Return the owner that is writing a block; None when it is not being written."""
        with self._database.reading() as connection:
            row = connection.execute(
                f"SELECT owner FROM blocks WHERE key = ? AND state = {State.WRITING:d}", (bytes.fromhex(key),)
            ).fetchone()
            return str(row[0]) if row else None

    # --- leaving ----------------------------------------------------------------------------------------------------

    def evict(
        self,
        nbytes: int,
        owner: str,
        keep: str,
        leased: Callable[[Place], bool],
        *,
        at_most: int,
        all_or_nothing: bool = True,
    ) -> list[Place]:
        """Mark blocks of ``nbytes`` in total as leaving: leaves first, in the order of their value to the policy.

        Args:
            nbytes: how many bytes to evict.
            owner: the owner that deletes the files.
            keep: a block that must stay (the parent of the block that needs the room).
            leased: whether a block is being read.
            at_most: upper limit of blocks for one call; a caller that needs more calls again.
            all_or_nothing: change nothing when fewer bytes can be evicted.

        Returns:
            The evicted blocks.
        """
        gone: list[Place] = []
        staying = [keep] if keep else []
        freed = 0
        with suppress(_NotEnoughError), self._database.transaction() as connection:
            if not is_filled(connection):  # the children of a block may not be known yet
                return []
            session = Session(self._policy, connection, self._saved_seconds)
            while freed < nbytes and len(gone) < at_most:
                valued = session.least()
                if valued is None:
                    if all_or_nothing:
                        raise _NotEnoughError
                    break
                place = valued.place
                if place.key == keep or leased(place):
                    staying.append(place.key)
                    continue
                connection.execute("UPDATE blocks SET owner = ? WHERE key = ?", (owner, bytes.fromhex(place.key)))
                move(connection, place.key, Move.EVICT)
                session.evicted(valued)
                gone.append(place)
                freed += place.nbytes
            if all_or_nothing and freed < nbytes:
                # A block stays while it has children: all ancestors of a block that stays, stay too. Names pin whole
                # chains.
                (evictable,) = connection.execute("SELECT bytes - held_bytes FROM total").fetchone()
                if evictable - bytes_up_to(connection, staying) < nbytes - freed:
                    raise _NotEnoughError
            session.end()
            return gone
        return []

    def would_evict(self, nbytes: int, leased: Callable[[Place], bool]) -> list[Place]:
        """Return the blocks that ``evict`` would mark to free ``nbytes``, as far as there are some; change nothing."""
        gone: list[Place] = []
        with suppress(_RolledBackError), self._database.transaction(long=True) as connection:
            if not is_filled(connection):
                return []
            session = Session(self._policy, connection, self._saved_seconds)
            freed = 0
            while freed < nbytes and (valued := session.least()) is not None:
                if not leased(valued.place):
                    move(connection, valued.place.key, Move.EVICT)
                    session.would_be_evicted(valued)
                    gone.append(valued.place)
                    freed += valued.place.nbytes
            raise _RolledBackError
        return gone

    def discard(self, keys: Iterable[str], owner: str) -> list[Place]:
        """Mark ready blocks as leaving, for ``owner`` to delete their files; return the marked blocks."""
        gone = []
        for some in batches(keys, _KEYS_AT_ONCE):
            with self._database.transaction() as connection:
                for key in some:
                    row = connection.execute(
                        "SELECT key, root, bytes FROM blocks WHERE key = ?", (bytes.fromhex(key),)
                    ).fetchone()
                    if row is not None and move(connection, key, Move.DISCARD):
                        connection.execute("UPDATE blocks SET owner = ? WHERE key = ?", (owner, row[0]))
                        gone.append(Place(row[0].hex(), row[1].hex(), row[2]))
        return gone

    def complete_delete(self, keys: Iterable[str]) -> None:
        """Delete the rows of blocks whose files are gone."""
        for some in batches(keys, _KEYS_AT_ONCE):
            with self._database.transaction() as connection:
                for key in some:
                    move(connection, key, Move.COMPLETE_DELETE)

    def unused_since(self, since: float) -> list[str]:
        """Return the keys of ready blocks that were last used before ``since`` (Unix time) and are not pinned."""
        with self._database.reading(long=True) as connection:
            rows = connection.execute(
                f"SELECT key FROM blocks WHERE used_at < ? AND {_READY} AND pins = 0 ORDER BY depth DESC",
                (since,),
            ).fetchall()
        return [row[0].hex() for row in rows]

    def moving(self, state: State) -> list[tuple[Place, str]]:
        """Return the blocks that are ``WRITING`` or ``LEAVING``, each with its owner."""
        with self._database.reading(long=True) as connection:
            rows = connection.execute(
                "SELECT key, root, bytes, owner FROM blocks INDEXED BY moving "
                f"WHERE state = ? AND state != {State.READY:d}",
                (int(state),),
            ).fetchall()
        return [(Place(row[0].hex(), row[1].hex(), row[2]), row[3]) for row in rows]

    # --- using ------------------------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[str], hits: Mapping[str, int]) -> None:
        """Note that a turn used the blocks ``keys``, and how often blocks were restored."""
        with self._database.transaction() as connection:
            session = Session(self._policy, connection, self._saved_seconds)
            session.used(keys, self._clock())
            session.end()
            connection.executemany(
                "UPDATE blocks SET hits = hits + ? WHERE key = ?", [(n, bytes.fromhex(key)) for key, n in hits.items()]
            )

    # --- counting ---------------------------------------------------------------------------------------------------

    def files(self) -> dict[str, int]:
        """Return the bytes of every block whose file may exist, by key."""
        with self._database.reading(long=True) as connection:
            return {row[0].hex(): row[1] for row in connection.execute("SELECT key, bytes FROM blocks")}

    def set_bytes(self, key: str, nbytes: int) -> None:
        """Correct the bytes of a block."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE blocks SET bytes = ? WHERE key = ?", (nbytes, bytes.fromhex(key)))

    def recount(self) -> tuple[int, int]:
        """Count all bytes anew; return the old and the new total."""
        with self._database.transaction(long=True) as connection:
            (before,) = connection.execute("SELECT bytes FROM total").fetchone()
            connection.execute(RECOUNT)
            (now,) = connection.execute("SELECT bytes FROM total").fetchone()
        return before, now

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, those being written or deleted included."""
        with self._database.reading() as connection:
            (total,) = connection.execute("SELECT bytes FROM total").fetchone()
        return int(total)

    def counts(self) -> tuple[int, int]:
        """Return the number of ready blocks, and of pinned ready blocks."""
        with self._database.reading() as connection:
            ready, pinned = connection.execute("SELECT ready, pinned FROM total").fetchone()
        return int(ready), int(pinned)

    def begin_boot(self, boot: str) -> bool:
        """Store the id of this boot of the machine; return whether it is known and the same as before."""
        with self._database.reading() as connection:
            (before,) = connection.execute("SELECT boot FROM total").fetchone()
        if before != boot:
            with self._database.transaction() as connection:
                connection.execute("UPDATE total SET boot = ?", (boot,))
        return bool(boot) and bool(before == boot)


_OUTCOMES = {State.READY: Prepared.PRESENT, State.WRITING: Prepared.ELSEWHERE, State.LEAVING: Prepared.LEAVING}
_ENTRY = "key, parent, root, tokens, depth, bytes, children, uses, hits, used_at, pins > 0, is_window"


def _neighbour(
    connection: Statements, parent: str, side: tuple[str, str], ids: bytes, since: float, windows: bool | None = None
) -> BlockId | None:
    """Return the first usable block after ``parent`` on one side of ``ids``.

    Only window blocks count if ``windows``, all others if not; blocks of all kinds with None.
    """
    which, order = side
    if windows is not None:
        which += f" AND is_window = {windows:d}"
    rows = connection.execute(
        f"SELECT {_IDENTITY}, state, used_at >= ? OR pins > 0 FROM blocks INDEXED BY siblings "
        f"WHERE parent = ? AND {which} ORDER BY {order} LIMIT ?",
        (since, bytes.fromhex(parent), ids, _PASSED_MOST),
    )
    with closing(rows):
        found = next((row for row in rows if row[4] == State.READY and row[5]), None)
    if found is None:
        return None
    block = _block_id(found[:4])
    if windows is not None and block.is_window != windows:
        raise ValueError(f"the row of block {block.key[:12]} is of another kind than its key")
    return block


def _block_id(row: tuple[bytes, bytes, bytes, bytes]) -> BlockId:
    return BlockId(row[0].hex(), row[1].hex(), row[2].hex(), decode_ids(row[3]))


def _entry(row: tuple[bytes, bytes, bytes, int, int, int, int, int, int, float, int, int]) -> Entry:
    key, parent, root = row[0].hex(), row[1].hex(), row[2].hex()
    return Entry(key, parent, root, *row[3:10], pinned=bool(row[10]), is_window=bool(row[11]))
