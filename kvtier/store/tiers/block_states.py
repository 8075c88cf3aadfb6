"""States of a block in a tier, and the moves between them, as one table.

``TABLE`` is the only place that says how a block may change its state, and the catalog moves a row only if its state is
one of ``sources(move)``. The drawing in the documentation is made from it, too.

A store and a load have two phases. A store is *prepared* (bytes are reserved, nothing can be found) and then completed
or aborted; a load is prepared by taking a *lease* and completed by ending it. What is leased is not evicted.
"""

from __future__ import annotations

from enum import IntEnum, unique
from types import MappingProxyType


@unique
class State(IntEnum):
    """What a block is to a tier. The numbers are those of the catalog."""

    ABSENT = 0
    """Not here. No row, no file, no bytes."""
    WRITING = 1
    """Its bytes are reserved and are being written by one process; lookups do not find it."""
    READY = 2
    """Whole: can be found, read and evicted."""
    LEASED = 3
    """Ready, and being read: cannot be evicted. In the catalog it is a ready row; its lease is a lock on its file."""
    LEAVING = 4
    """Cannot be found any more; its bytes count until they are gone."""


@unique
class Move(IntEnum):
    """What can happen to a block."""

    PREPARE_STORE = 1
    COMPLETE_STORE = 2
    ABORT_STORE = 3
    """The write failed, or its process died: what there is of it is taken back."""
    ADOPT = 4
    """A whole file is found that has no row, or whose writer died before it could complete it."""
    PREPARE_LOAD = 5
    COMPLETE_LOAD = 6
    """The last reader is done."""
    EVICT = 7
    """It must make room."""
    DISCARD = 8
    """It is damaged, expired, replaced by a longer one, or to be forgotten. Those who read it may finish."""
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
    """A block was to do what no block in its state can do: a bug in kvtier."""


def after(state: State, move: Move) -> State:
    """Return the state of a block after ``move``.

    Raises:
        IllegalMoveError: a block in this state cannot do that.
    """
    try:
        return TABLE[state, move]
    except KeyError:
        raise IllegalMoveError(f"a block that is {state.name.lower()} cannot {move.name.lower()}") from None


def sources(move: Move) -> tuple[State, ...]:
    """Return the states in which a block can do ``move``."""
    return tuple(state for state, m in TABLE if m is move)
