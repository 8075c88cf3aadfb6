"""In which pieces the prompt of a model with states is fed, so that its states can be kept where they are worth it."""

from __future__ import annotations

from itertools import pairwise

from kvtier.hf.turn.turn import Turn

# What a snapshot must spare the next prompt that parts from this one at the same place: it costs one more forward pass.
WORTH_A_SNAPSHOT_TOKENS = 16
# How far apart snapshots of a long prompt are: an edit then costs half of it on average (benchmarks/snapshots.py).
SPACING_TOKENS = 2048
# A token that is fed alone takes about as long as so many that are fed together.
_ALONE = 4


def plan_pieces(turn: Turn, *, token_by_token: bool, may_feed: bool) -> None:
    """Fill in the pieces of a turn that ``generate`` must not feed at once, and where states are kept besides its ends.

    Where two prompts part, a third one may: what was known up to there, without states, gets them now. (Marconi, MLSys
    2025, keeps the states of hybrid models at such branches.)

    Args:
        turn: planned, not started.
        token_by_token: whether the model can only go on from a prefix by one token at a time. Where that takes longer
            than to begin anew, or pieces cannot be fed, the turn begins anew.
        may_feed: whether anything can be fed before ``generate`` feeds the rest.
    """
    assert turn.prompt is not None
    end = turn.prompt.columns - 1  # generate must be left one token
    begin = turn.prefix.columns if turn.prefix is not None else 0
    if (
        turn.prefix is not None
        and token_by_token
        and begin < end
        and not (may_feed and (end - begin) * _ALONE <= begin)
    ):
        turn.prefix.close()
        turn.prefix, begin = None, 0
        turn.reason = "this model takes what follows a prefix token by token, which would take longer"
    if not may_feed or turn.prompt.is_padded:
        return
    cut = turn.known_columns
    if token_by_token:
        if begin:
            turn.pieces = [(column, column + 1) for column in range(begin, end)]
        elif cut == end >= WORTH_A_SNAPSHOT_TOKENS:  # one token is left to go on by
            turn.pieces = [(0, end)]
        turn.snapshot_columns = {cut}
        return
    columns = {column for column in range(0, end, SPACING_TOKENS) if begin < column <= end - SPACING_TOKENS // 2}
    if cut - begin >= WORTH_A_SNAPSHOT_TOKENS:
        columns = {c for c in columns if abs(c - cut) >= SPACING_TOKENS // 2} | {cut}
    turn.snapshot_columns = columns
    turn.pieces = list(pairwise([begin, *sorted(columns)]))
