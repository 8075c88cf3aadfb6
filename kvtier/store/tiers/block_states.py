"""States of a block in a tier, and the moves between them, as one table.

``TABLE`` alone defines the legal state changes. The catalog moves a row only if its state is one of ``sources(move)``.
The diagram in the documentation is generated from the table too.

Stores and loads have two phases. A store is *prepared* (bytes are reserved, lookups do not find the block) and then
completed or aborted. A load is prepared by taking a *lease* and completed by ending it. A leased block is not evicted.
"""

from __future__ import annotations

from enum import IntEnum, unique
from types import MappingProxyType


@unique
class State(IntEnum):
    """State of a block in a tier. The catalog stores these numbers."""

    ABSENT = 0
    """Not stored: no row, no file, no bytes."""
    WRITING = 1
    """Its bytes are reserved and are being written by one process; lookups do not find it."""
    READY = 2
    """Whole: can be found, read and evicted."""
    LEASED = 3
    """Ready, and being read: cannot be evicted. In the catalog it is a ready row; its lease is a lock in a file."""
    LEAVING = 4
    """Lookups no longer find it; its bytes count until they are freed."""


@unique
class Move(IntEnum):
    """A state change of a block."""

    PREPARE_STORE = 1
    COMPLETE_STORE = 2
    ABORT_STORE = 3
    """The write failed, or its process died: its leftovers are removed."""
    ADOPT = 4
    """A complete file has no row, or its writer died before completing the store."""
    PREPARE_LOAD = 5
    COMPLETE_LOAD = 6
    """The last reader has finished."""
    EVICT = 7
    """It makes room for other blocks."""
    DISCARD = 8
    """It is damaged, expired, replaced by a longer block, or forgotten on request. Readers may finish."""
    COMPLETE_DELETE = 9


TABLE = MappingProxyType(
    {
        (State.ABSENT, Move.PREPARE_STORE): State.WRITING,
        (State.ABSENT, Move.ADOPT): State.READY,
        (State.WRITING, Move.COMPLETE_STORE): State.READY,
        (State.WRITING, Move.ABORT_STORE): State.ABSENT,
        (State.WRITING, Move.ADOPT): State.READY,
        (State.READY, Move.PREPARE_LOAD): State.LEASED,
        (State.READY, Move.EVICT): State.LEAVING,
        (State.READY, Move.DISCARD): State.LEAVING,
        (State.LEASED, Move.PREPARE_LOAD): State.LEASED,
        (State.LEASED, Move.COMPLETE_LOAD): State.READY,
        (State.LEASED, Move.DISCARD): State.LEAVING,
        (State.LEAVING, Move.COMPLETE_LOAD): State.LEAVING,
        (State.LEAVING, Move.COMPLETE_DELETE): State.ABSENT,
    }
)


class IllegalMoveError(Exception):
    """A move that the state of the block does not allow: a bug in kvtier."""


def after(state: State, move: Move) -> State:
    """Return the state of a block after ``move``.

    Raises:
        IllegalMoveError: the state does not allow the move.
    """
    try:
        return TABLE[state, move]
    except KeyError:
        raise IllegalMoveError(f"a block that is {state.name.lower()} cannot {move.name.lower()}") from None


def sources(move: Move) -> tuple[State, ...]:
    """Return the states that allow ``move``."""
    return tuple(state for state, m in TABLE if m is move)
