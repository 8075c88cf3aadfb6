"""Rows of blocks within a transaction: inserted, moved between states, placed in their chain."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

from kvtier.store.chain import BlockId
from kvtier.store.tiers.block_states import Move, State, after, sources
from kvtier.store.tiers.disk.catalog.connection import Statements
from kvtier.store.tiers.disk.catalog.id_codes import encode_ids
from kvtier.store.tiers.disk.catalog.ranking import Session
from kvtier.store.tiers.disk.catalog.schema import SCHEMA_VERSION, UNPLACED

T = TypeVar("T")


def is_filled(connection: Statements) -> bool:
    """Whether the tables know all files; they do not during a rebuild."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return bool(version == SCHEMA_VERSION)


def depth_after(connection: Statements, block: BlockId) -> int | None:
    """Return how many tokens precede ``block``, or ``UNPLACED``; None when its parent has no row, or is leaving."""
    if block.parent == block.root:
        return 0
    row = connection.execute(
        f"SELECT depth, tokens FROM blocks WHERE key = ? AND state != {State.LEAVING:d}", (bytes.fromhex(block.parent),)
    ).fetchone()
    if row is None:
        return None
    return UNPLACED if row[0] < 0 else int(row[0] + row[1])


def insert(
    connection: Statements,
    session: Session,
    block: BlockId,
    depth: int,
    nbytes: int,
    state: State,
    owner: str,
    used_at: float,
) -> None:
    """Insert a row. ``used_at`` is the Unix time of the last use."""
    key = bytes.fromhex(block.key)
    usage, standing = session.entered(block, max(depth, 0), nbytes)
    connection.execute(
        "INSERT INTO blocks SELECT :key, :parent, :root, :state, :owner, :tokens, :depth, :bytes, "
        f"(SELECT COUNT(*) FROM blocks AS c WHERE c.parent = :key AND c.state != {State.LEAVING:d}), "
        "(SELECT COUNT(*) FROM links WHERE links.key = :key AND links.pinned), "
        ":uses, 0, :last_use, :queue, :priority, :note, :used_at, :is_window, :ids",
        {
            "key": key,
            "parent": bytes.fromhex(block.parent),
            "root": bytes.fromhex(block.root),
            "state": state,
            "owner": owner,
            "tokens": len(block.tokens),
            "depth": depth,
            "bytes": nbytes,
            "uses": usage.uses,
            "last_use": usage.last_use,
            "queue": standing.queue,
            "priority": standing.priority,
            "note": standing.note,
            "used_at": used_at,
            "is_window": block.is_window,
            "ids": encode_ids(block.tokens),
        },
    )


def move(connection: Statements, key: str, what: Move, owner: str | None = None) -> bool:
    """Change the state of a block, if its state and ``owner`` (None: any) allow; return whether it changed."""
    # A lease is no state of a row: a leased block is ready here.
    states = [state for state in sources(what) if state not in (State.ABSENT, State.LEASED)]
    (target,) = {after(state, what) for state in states}
    change = "DELETE FROM blocks" if target is State.ABSENT else f"UPDATE blocks SET state = {target:d}"
    where = f"WHERE key = ? AND state IN ({', '.join(f'{state:d}' for state in states)})"
    values: list[object] = [bytes.fromhex(key)]
    if owner is not None:
        where += " AND owner = ?"
        values.append(owner)
    return connection.execute(f"{change} {where}", values).rowcount > 0


def bytes_up_to(connection: Statements, keys: Iterable[str]) -> int:
    """Return the bytes of blocks and their ancestors that are ready and not pinned, each counted once."""
    total = 0
    seen: set[bytes] = set()
    for key in map(bytes.fromhex, keys):
        while key not in seen:
            seen.add(key)
            row = connection.execute(
                f"SELECT parent, bytes FROM blocks WHERE key = ? AND state = {State.READY:d} AND pins = 0", (key,)
            ).fetchone()
            if row is None:
                break
            key, total = row[0], total + row[1]
    return total


def place_below(connection: Statements, key: bytes) -> None:
    """Correct the depths of all blocks that follow block ``key``."""
    connection.execute(_PLACE_BELOW, {"key": key})


_PLACE_BELOW = """
WITH RECURSIVE walk(key, depth, until) AS (
    SELECT key, depth, depth + tokens FROM blocks WHERE key = :key AND depth >= 0
    UNION ALL
    SELECT c.key, walk.until, walk.until + c.tokens
    FROM walk JOIN blocks AS c ON c.parent = walk.key
    WHERE c.depth != walk.until AND c.parent != c.root AND c.key != :key  -- parents may form a cycle
)
UPDATE blocks SET depth = walk.depth FROM walk WHERE walk.key = blocks.key AND blocks.depth != walk.depth
"""


def place_some(connection: Statements, at_most: int) -> bool:
    """Set the depths of some blocks that have none yet, and of their ancestors; return whether there were any.

    A block whose parent has no row gets depth 0.
    """
    unplaced = connection.execute("SELECT key FROM blocks WHERE depth < 0 LIMIT ?", (at_most,)).fetchall()
    for (key,) in unplaced:
        way: dict[bytes, int] = {}
        until = 0
        while key not in way:  # parents may form a cycle
            row = connection.execute("SELECT parent, root, depth, tokens FROM blocks WHERE key = ?", (key,)).fetchone()
            if row is None:
                break
            parent, root, depth, tokens = row
            if depth >= 0:
                until = depth + tokens
                break
            way[key] = tokens
            if parent == root:
                break
            key = parent
        for each, tokens in reversed(way.items()):
            connection.execute("UPDATE blocks SET depth = ? WHERE key = ?", (until, each))
            until += tokens
    return bool(unplaced)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield ``items`` in lists of ``size``; the last may be shorter."""
    items = iter(items)
    while some := list(itertools.islice(items, size)):
        yield some
