"""``TurnReport``: plain immutable values, with right defaults for a turn in which nothing happened."""

from __future__ import annotations

import dataclasses

import pytest

from kvtier import TurnReport
from kvtier.report import Divergence, RowReport
from tests.support.upstream import CACHE


def test_empty_report_has_zero_counts_and_no_reason():
    report = TurnReport()
    assert (report.prompt_tokens, report.cached_tokens, report.computed_tokens, report.generated_tokens) == (0, 0, 0, 0)
    assert (report.restored_bytes, report.restore_seconds) == (0, 0.0)
    assert dict(report.cached_by_tier) == {"device": 0, "host": 0, "disk": 0}
    assert (report.miss_reason, report.divergence, report.rows) == (None, None, ())


@pytest.mark.parametrize("value", [TurnReport(), RowReport(3, 2), Divergence(1, 2, 3)], ids=lambda v: type(v).__name__)
def test_report_values_are_immutable(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, 1)
    with pytest.raises((AttributeError, TypeError)):
        value.something_else = 1


def test_cached_by_tier_is_read_only_and_zero_by_default():
    first, second = TurnReport(), TurnReport()
    with pytest.raises(TypeError):
        first.cached_by_tier["disk"] = 5
    assert second.cached_by_tier["disk"] == 0


def test_reports_of_equal_turns_are_equal():
    def report(expected):
        rows = (RowReport(5, 3, 2, Divergence(3, expected, 7)),)
        return TurnReport(prompt_tokens=5, cached_tokens=3, computed_tokens=2, generated_tokens=2, rows=rows)

    assert report(1) == report(1)
    assert report(1) != report(2)
    assert "expected" not in repr(report(1)), "token ids are user text"


# --- reports of a cache's turns ---------------------------------------------------------------------------------------


def test_report_does_not_change_with_the_next_turn(model, generate, tokens, cache):
    """The next turn makes a new report."""
    generate(model, tokens(20), cache)
    first = cache.last_turn
    before = repr(first)
    generate(model, tokens(20), cache)
    assert cache.last_turn is not first
    assert repr(first) == before
    assert isinstance(first, TurnReport)


def test_begin_and_commit_each_set_the_report_of_the_last_turn(model, tokens, cache):
    ids = tokens(20)
    begun = cache.begin(model, ids)
    assert (begun.prompt_tokens, begun.computed_tokens, begun.generated_tokens) == (20, 20, 0)
    assert cache.last_turn is begun
    model(ids, **{CACHE: cache})
    ended = cache.commit(tokens(20).repeat(1, 1))
    assert cache.last_turn is ended
    assert (ended.prompt_tokens, ended.generated_tokens) == (20, 0)


def test_restored_bytes_count_only_tokens_loaded_from_the_store(model, generate, tokens, store, cache):
    from kvtier import TieredCache

    generate(model, tokens(20), cache)
    assert cache.last_turn.restored_bytes == 0
    generate(model, tokens(20), cache)
    assert (cache.last_turn.cached_by_tier["device"], cache.last_turn.restored_bytes) == (19, 0)
    with TieredCache(store) as other:
        generate(model, tokens(20), other)
        config = model.config
        token_bytes = config.num_hidden_layers * 2 * config.num_key_value_heads * 16 * 4
        assert other.last_turn.cached_by_tier["host"] == 19
        assert other.last_turn.restored_bytes == 19 * token_bytes
        assert other.last_turn.restore_seconds > 0


def test_report_divergence_is_that_of_the_first_row(model, generate, tokens, cache):
    ids = tokens(20, rows=2)
    generate(model, ids, cache)
    changed = ids.clone()
    changed[0, 12] = 199 - ids[0, 12]
    changed[1, 7] = 199 - ids[1, 7]
    generate(model, changed, cache)
    report = cache.last_turn
    assert report.divergence == Divergence(12, int(ids[0, 12]), int(changed[0, 12]))
    assert report.rows[0].divergence == report.divergence
    assert report.rows[1].divergence == Divergence(7, int(ids[1, 7]), int(changed[1, 7]))
    assert [row.cached_tokens for row in report.rows] == [7, 7]


def test_prompt_that_is_a_prefix_of_the_cached_tokens_has_no_divergence(model, generate, tokens, cache):
    generate(model, tokens(20), cache)
    generate(model, tokens(20)[:, :15], cache)
    assert cache.last_turn.divergence is None
