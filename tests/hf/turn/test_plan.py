"""The prefill plan of models with states: in which chunks a prompt is fed, and where its states are kept."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.hf.inputs.prompt import Prompt, ResidentPrefix
from kvtier.hf.turn.candidates import Candidates, RowCandidates
from kvtier.hf.turn.cost import COSTS
from kvtier.hf.turn.plan import Abilities, plan, plan_prefill
from kvtier.store.reading.lookup import PrefixMatch

SPACING_TOKENS, WORTH_A_SNAPSHOT_TOKENS = COSTS.checkpoint_spacing_tokens, COSTS.checkpoint_worth_tokens


def turn(columns, *, cached=0, known=None, pad=0):
    prompt = Prompt((np.arange(columns - pad),), (pad,), columns)
    return prompt, cached, cached if known is None else known


def planned(turn, *, token_by_token=False, may_feed=True):
    found = plan_prefill(*turn, Abilities(True, token_by_token, may_feed), COSTS)
    return list(found.chunks), set(found.checkpoint_columns)


def test_ordinary_prompt_is_prefilled_at_once():
    assert planned(turn(100)) == ([], set())
    assert planned(turn(100, cached=60)) == ([], set())


def test_prefix_known_without_states_gets_a_checkpoint():
    assert planned(turn(100, known=70)) == ([(0, 70)], {70})
    assert planned(turn(100, cached=40, known=70)) == ([(40, 70)], {70})
    assert planned(turn(100, cached=40, known=99)) == ([(40, 99)], {99})


def test_checkpoint_is_skipped_if_it_saves_too_few_tokens():
    assert planned(turn(100, cached=40, known=40 + WORTH_A_SNAPSHOT_TOKENS - 1)) == ([], set())
    assert planned(turn(100, cached=40, known=40 + WORTH_A_SNAPSHOT_TOKENS))[1] == {40 + WORTH_A_SNAPSHOT_TOKENS}


def test_long_prompt_is_prefilled_in_chunks_with_checkpoints():
    n = SPACING_TOKENS
    assert planned(turn(3 * n)) == ([(0, n), (n, 2 * n)], {n, 2 * n})
    assert planned(turn(3 * n, cached=n + 5)) == ([(n + 5, 2 * n)], {2 * n})
    assert planned(turn(n + 9)) == ([], set())  # too few tokens would be left
    cut = 2 * n + 9  # replaces the checkpoint close to it
    assert planned(turn(4 * n, known=cut)) == ([(0, n), (n, cut), (cut, 3 * n)], {n, cut, 3 * n})


@pytest.mark.parametrize(
    ("columns", "cached", "known"), [(9000, 0, 0), (9000, 3000, 8000), (2500, 0, 2499), (50, 3, 3)]
)
def test_prefill_chunks_are_contiguous_and_leave_at_least_one_token(columns, cached, known):
    pieces, checkpoints = planned(turn(columns, cached=cached, known=known))
    edge = cached
    for begin, end in pieces:
        assert begin == edge < end
        edge = end
    assert edge < columns
    assert checkpoints <= {end for _, end in pieces}


def planned_token_by_token(turn, *, may_feed=True):
    """Plan a turn on a model that continues a prefix token by token. Its layers hold the known prefix."""
    prompt, cached, known = turn
    resident = ResidentPrefix((np.arange(cached),), (0,), cached)
    row = RowCandidates(0, cached, PrefixMatch((), None))
    candidates = Candidates(resident, (row,), (known,), known, known, known)
    return plan(prompt, candidates, Abilities(True, True, may_feed), COSTS)


def test_token_by_token_prefill_is_planned_only_if_it_pays():
    short = planned_token_by_token(turn(100, cached=90))
    assert short.columns == 90
    assert short.prefill.chunks == tuple((column, column + 1) for column in range(90, 99))
    long = planned_token_by_token(turn(200, cached=90))
    assert (long.prefill.chunks, long.prefill.checkpoint_columns) == ((), {90})
    assert long.columns == 0
    assert "token by token" in long.reason


def test_token_by_token_model_feeds_a_known_prompt_up_to_the_last_token():
    assert planned(turn(100, known=99), token_by_token=True) == ([(0, 99)], {99})
    assert planned(turn(100, known=70), token_by_token=True)[0] == []
    one_left = planned_token_by_token(turn(100, cached=99))
    assert one_left.prefill.chunks == ()
    assert one_left.columns == 99


def test_plan_has_no_chunks_if_no_feeding_is_allowed():
    assert planned(turn(100, known=70), may_feed=False) == ([], set())
    assert planned(turn(9000), may_feed=False) == ([], set())
    cannot = planned_token_by_token(turn(100, cached=95), may_feed=False)
    assert (cannot.columns, cannot.prefill.chunks) == (0, ())


def test_padded_prompt_is_prefilled_at_once():
    assert planned(turn(9000, pad=3)) == ([], set())
