"""The state table of a block, and leases: none outlives its reader by accident."""

import gc
import threading

import pytest

from kvtier.store.tiers.block_states import TABLE, IllegalMoveError, Move, State, after, sources
from kvtier.store.tiers.leases import Leases


def test_block_state_table_uses_every_state_and_every_move():
    assert {state for state, _ in TABLE} | set(TABLE.values()) == set(State)
    assert {move for _, move in TABLE} == set(Move)


def test_every_block_state_can_be_reached_and_left():
    reached, states = {State.ABSENT}, [State.ABSENT]
    while states:
        state = states.pop()
        for (source, _), target in TABLE.items():
            if source is state and target not in reached:
                reached.add(target)
                states.append(target)
    assert reached == set(State)
    assert {state for state, _ in TABLE} == set(State)


def test_writing_or_leaving_blocks_cannot_be_loaded_nor_leased_blocks_evicted():
    assert sources(Move.PREPARE_LOAD) == (State.READY, State.LEASED)
    assert sources(Move.EVICT) == (State.READY,)
    never = ((State.WRITING, Move.PREPARE_LOAD), (State.LEAVING, Move.PREPARE_LOAD), (State.LEASED, Move.EVICT))
    for state, move in never:
        with pytest.raises(IllegalMoveError, match=f"{state.name.lower()} cannot {move.name.lower()}"):
            after(state, move)


def test_aborting_a_store_returns_the_block_to_absent():
    assert after(after(State.ABSENT, Move.PREPARE_STORE), Move.ABORT_STORE) is State.ABSENT


def test_block_stays_leased_until_its_last_lease_ends():
    leases = Leases()
    first, second = leases.prepare_load("a"), leases.prepare_load("a")
    assert leases.state("a") is State.LEASED
    first.end()
    first.end()
    assert "a" in leases
    with second:
        pass
    assert leases.state("a") is State.READY
    assert len(leases) == 0


def test_lease_callback_runs_once_after_the_last_lease_has_left():
    told = []
    leases = Leases(lambda key: told.append((key, key in leases)))
    first, second = leases.prepare_load("a"), leases.prepare_load("a")
    first.end()
    assert told == []
    second.end()
    second.end()
    assert told == [("a", False)]


def test_garbage_collected_lease_ends():
    leases = Leases()
    leases.prepare_load("a")
    gc.collect()
    assert "a" not in leases


def test_exception_inside_a_with_statement_ends_the_lease():
    leases = Leases()
    with pytest.raises(ValueError, match="no"), leases.prepare_load("a"):
        raise ValueError("no")
    assert "a" not in leases


def test_leases_taken_by_many_threads_are_counted_correctly():
    leases = Leases()

    def work():
        for _ in range(500):
            with leases.prepare_load("a"), leases.prepare_load("b"):
                assert "a" in leases

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(leases) == 0
