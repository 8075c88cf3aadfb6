"""The trace reader, the workloads and the figures of the benchmark that compares eviction policies."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import eviction
from benchmarks.__main__ import app
from benchmarks.block_workloads import ASSISTANTS, CHATS, MODELS, draw
from benchmarks.contenders import Balance, Frequency, Optimum
from benchmarks.measure import BenchmarkError, Options
from benchmarks.replay import Contender, Replay
from benchmarks.table import format_value
from benchmarks.trace import LARGE, ROOT, SMALL, Trace, read_trace


def written(tmp_path, *requests):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in requests), encoding="utf-8")
    return path


def singles(*asked):
    trace = Trace()
    for _ in range(max(asked) + 1):
        trace.add_block(ROOT, 256, SMALL)
    trace.count_bytes_by_blocks()
    trace.requests = [(each,) for each in asked]
    return trace


def found(contender, trace, capacity):
    return [Replay.turn(replay, chain) for replay in [Replay(trace, contender, capacity)] for chain in trace.requests]


# --- traces -----------------------------------------------------------------------------------------------------------


def test_trace_reader_shares_prefixes_and_keeps_a_short_last_block(tmp_path):
    path = written(
        tmp_path,
        {"input_length": 1100, "hash_ids": [7, 8, 9]},
        {"input_length": 1024, "hash_ids": [7, 11]},
    )
    trace = read_trace(path)
    assert trace.requests == [[0, 1, 2], [0, 3]]
    assert trace.parents == [ROOT, 0, 1, 0]
    assert trace.tokens == [512, 512, 76, 512]
    assert trace.depths == [0, 512, 1024, 512]
    assert trace.sizes == [1, 1, 1, 1]
    assert trace.operations[3] > trace.operations[0]
    assert read_trace(path, 1).requests == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("requests", "what"),
    [
        ([{"input_length": 5}], "line 1: no request"),
        ([{"input_length": 512, "hash_ids": [1]}, 7], "line 2: no request"),
        ([{"input_length": 512, "hash_ids": [1, 2]}], "line 1: more blocks than 512 tokens make"),
        (
            [{"input_length": 1024, "hash_ids": [1, 2]}, {"input_length": 1024, "hash_ids": [3, 2]}],
            "line 2: block 2 follows another one",
        ),
        ([], "holds no requests"),
    ],
)
def test_invalid_trace_is_refused_with_a_reason(tmp_path, requests, what):
    with pytest.raises(BenchmarkError, match=what):
        read_trace(written(tmp_path, *requests))


def test_missing_trace_is_named_in_the_error(tmp_path):
    with pytest.raises(BenchmarkError, match="nowhere"):
        read_trace(tmp_path / "nowhere")


# --- workloads --------------------------------------------------------------------------------------------------------


def test_seed_determines_the_workload():
    assert draw(ASSISTANTS, 100, 1) == draw(ASSISTANTS, 100, 1) != draw(ASSISTANTS, 100, 2)


def test_workload_requests_are_chains_and_share_prefixes():
    trace = draw(CHATS, 200, 0)
    assert len(trace.requests) == 200
    assert len(trace.parents) < sum(map(len, trace.requests)) / 2
    for chain in trace.requests:
        assert [trace.parents[block] for block in chain] == [ROOT, *chain[:-1]]


def test_models_differ_in_bytes_and_in_operations_per_byte():
    trace = draw(MODELS, 50, 0)
    assert len(set(trace.sizes)) == 3
    assert LARGE.operations(256, 0) / LARGE.token_bytes > SMALL.operations(256, 0) / SMALL.token_bytes


def test_operations_add_up_over_the_blocks_of_a_prompt():
    whole = SMALL.operations(1024, 0)
    assert sum(SMALL.operations(256, depth) for depth in range(0, 1024, 256)) == pytest.approx(whole)


# --- reference policies -----------------------------------------------------------------------------------------------


def test_optimum_evicts_the_block_whose_next_use_is_last():
    trace = singles(0, 1, 2, 0, 2, 1)
    assert found(Optimum(trace), trace, 2) == [0, 0, 0, 1, 1, 0]


def test_frequency_keeps_the_more_often_used_block():
    trace = singles(0, 0, 1, 2, 0, 1)
    assert found(Frequency(trace), trace, 2) == [0, 1, 0, 0, 1, 0]


def test_balance_keeps_reused_blocks_through_a_scan():
    trace = singles(0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 0, 1)
    assert found(Balance(trace), trace, 3)[-2:] == [1, 1]
    assert found(eviction.CONTENDERS["LRU"](trace), trace, 3)[-2:] == [0, 0]


def test_balance_makes_room_for_single_use_blocks_when_their_ghosts_return():
    trace = singles(0, 0, 1, 1, 2, 3, 2, 3, 2)
    contender = Balance(trace)
    found(contender, trace, 2)
    assert contender._target > 0


def test_contender_that_picks_an_empty_queue_is_detected():
    class Wrong(Contender):
        name, queues = "wrong", 2

        def put(self, block):
            return 0, 0.0

        used = put

        def pick(self, firsts):
            return 1

    trace = singles(0, 1)
    with pytest.raises(AssertionError, match="wrong picked an empty queue"):
        found(Wrong(trace), trace, 1)


# --- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(eviction, "_QUICK_REQUESTS", 20)


def test_figures_are_hit_shares_and_gaps_to_the_optimum(short, tmp_path):
    trace = written(tmp_path, *[{"input_length": 1024, "hash_ids": [n % 3, 10 + n % 3]} for n in range(30)])
    result = eviction.run(Options(rounds=1, quick=True, trace=trace))
    first = result.cases[0]
    assert first.unit == "share"
    assert first.row("optimum").samples == (34 / 40,)  # of 20 requests, all but the first three, at any capacity
    assert first.facts["below_optimum"] == dict.fromkeys(eviction.CONTENDERS, 0.0)
    assert {row.name for row in first.rows} == set(eviction.CONTENDERS)
    assert len(result.targets) == len(eviction.TRACE_BLOCKS) + 9 + 6  # drawn workloads, and those of several models
    assert all(0 <= sample <= 1 for case in result.cases for row in case.rows for sample in row.samples)


def test_benchmark_without_a_trace_gives_the_same_result_twice(short):
    assert eviction.run(Options(quick=True)) == eviction.run(Options(quick=True))


def test_missing_trace_ends_the_program_with_status_2(tmp_path):
    done = CliRunner().invoke(app, ["eviction", "--trace", str(tmp_path / "nowhere")])
    assert done.exit_code == 2


def test_shares_are_formatted_as_percentages():
    assert format_value(0.12345, "share") == "12.35%"
