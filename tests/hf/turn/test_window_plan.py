"""Where a prompt can go on in a model with sliding layers: pure functions against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvtier.hf.inputs.prompt import Prompt
from kvtier.hf.turn.cost import Costs
from kvtier.hf.turn.windows import KnownWindows, common, first_column, last_column, merged, wanted_columns
from kvtier.kv.window import Window

LONGEST = 40
places = st.integers(0, LONGEST)
ranges = st.lists(st.tuples(places, places).map(lambda pair: tuple(sorted(pair))), max_size=4)
windows = st.builds(Window, st.integers(2, 12), st.integers(1, 6))


def members(some):
    return {place for begin, end in some for place in range(begin, end)}


@given(ranges, ranges)
def test_unions_and_intersections_have_the_members_of_sets(some, others):
    union = merged(some)
    assert members(union) == members(some)
    assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(union))
    assert members(common(union, merged(others))) == members(some) & members(others)


@st.composite
def rows(draw, window):
    tokens = draw(st.integers(1, LONGEST))
    shared = draw(st.integers(0, tokens))
    held = draw(st.integers(0, LONGEST)), shared
    return KnownWindows(window, tokens, held, merged(draw(ranges)))


def needed(window, tokens):
    """The tokens that sliding layers need after ``tokens`` tokens: the visible ones, and the rest of their block."""
    first = min(max(0, tokens - window.visible + 1), tokens // window.block_tokens * window.block_tokens)
    return set(range(first, tokens))


def goes_on(row, tokens):
    wanted = {token for token in needed(row.window, tokens) if token < row.tokens}
    stored, held = members(row.stored), set(range(*row.held)) if row.held[0] < row.held[1] else set()
    has_all_held = not wanted or row.held[0] <= min(needed(row.window, tokens), default=tokens)
    return wanted <= stored or (has_all_held and wanted <= stored | held)


@given(st.data(), windows, places)
def test_a_row_goes_on_where_all_needed_tokens_are_known(data, window, limit):
    row = data.draw(rows(window))
    possible = [tokens for tokens in range(1, limit + 1) if row.admit(tokens)]
    assert all(goes_on(row, tokens) for tokens in possible)
    last = row.last(limit)
    assert last == 0 or row.admit(last)
    reachable = [t for t in range(1, limit + 1) if goes_on(row, t)]
    assert last >= max(reachable, default=0)


@given(st.data(), windows, st.lists(st.integers(0, 6), min_size=1, max_size=3), places)
def test_rows_of_a_batch_go_on_at_the_last_column_that_suits_all(data, window, pads, limit):
    known = [data.draw(rows(window)) for _ in pads]
    columns = max(pad + row.tokens for pad, row in zip(pads, known, strict=True)) + 1
    prompt = Prompt(tuple(np.arange(row.tokens) for row in known), tuple(pads), columns, wholes=((3, 6),))
    limit = min(limit, columns - 1)
    found = last_column(prompt, limit, known)

    def suits(column):
        later = [row.admit(column - pad) for pad, row in zip(pads, known, strict=True) if pad < column]
        return prompt.admits(column) and all(later)

    assert found == 0 or suits(found)
    assert found >= max((column for column in range(1, limit + 1) if suits(column)), default=0)
    first = first_column(prompt, found, window)
    assert all(first <= pad + min(needed(window, found - pad), default=found) for pad in pads if pad < found)
    reused = any(pad < found for pad in pads)
    assert not reused or first <= max(0, found - window.visible + 1), "padding is seen, too"


@given(windows, st.integers(1, 200), st.integers(0, 50), st.integers(0, 100), st.integers(0, 5))
def test_wanted_columns_allow_going_on_at_the_end_at_a_branch_and_at_a_distance(window, tokens, begin, branch, pad):
    costs = Costs(window_spacing_tokens=24, window_spacing_windows=2, window_margin_tokens=7)
    prompt = Prompt((np.arange(tokens),), (pad,), tokens + pad)
    wanted = members(wanted_columns(prompt, begin, branch, window, costs))
    spacing = max(24, 2 * window.visible)
    places = {tokens, *range(max(1, tokens - 7), tokens)}
    places |= {place for place in range(0, tokens, spacing) if pad + place > begin}
    if branch - begin >= costs.checkpoint_worth_tokens and branch <= prompt.columns:
        places.add(branch - pad)
    for place in places:
        if place > 0:
            start = min(needed(window, place), default=place) // window.block_tokens * window.block_tokens
            assert set(range(pad + start, pad + place)) <= wanted
