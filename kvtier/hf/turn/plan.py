"""The plan of a turn, a pure function of its candidates: how much is reused, from where, and how the rest is fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from kvtier.hf.inputs.prompt import Prompt
from kvtier.hf.layers.loads.prefix_load import RowPlan
from kvtier.hf.turn.candidates import Candidates, RowCandidates
from kvtier.hf.turn.choice.decision import COMPUTE, HELD, LOAD, Decision, Estimates, StoredRange, decide
from kvtier.hf.turn.cost import Costs
from kvtier.hf.turn.windows import first_column
from kvtier.store.chain import BlockId
from kvtier.store.reading.lookup import PrefixMatch, Span


@dataclass(frozen=True, slots=True)
class Abilities:
    """How a model can continue from a prefix, and how its prompt can be fed.

    Attributes:
        states: whether the model can continue only from columns with known states.
        token_by_token: whether the model can continue by only one token at a time.
        may_feed: whether chunks can be fed before ``generate`` feeds the rest.
        may_split: whether chunks can be fed while what follows them loads.
    """

    states: bool = False
    token_by_token: bool = False
    may_feed: bool = False
    may_split: bool = False


@dataclass(frozen=True, slots=True)
class Weighing:
    """What a plan weighs a load by.

    Attributes:
        estimates: what computing and loading are expected to cost.
        tiers: where each block would be read from, by key.
    """

    estimates: Estimates
    tiers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prefill:
    """How the prompt of a turn is fed.

    Attributes:
        chunks: columns ``(begin, end)`` of each chunk fed, in order, before ``generate`` feeds the rest.
        checkpoint_columns: columns at which states are kept, besides the ends of prompt and turn.
    """

    chunks: tuple[tuple[int, int], ...] = ()
    checkpoint_columns: frozenset[int] = frozenset()


NO_PREFILL = Prefill()
"""``generate`` feeds the whole prompt, and states are kept only at the ends of prompt and turn."""


def plan_prefill(prompt: Prompt, begin: int, cut: int, abilities: Abilities, costs: Costs) -> Prefill:
    """Return how the prompt of a model with states is fed, after ``begin`` reused columns.

    Prompts tend to branch at the same place: if K and V but no states are known up to the column ``cut``, states are
    kept there. (Marconi, MLSys 2025, keeps the states of hybrid models at such branches.)
    """
    if not abilities.may_feed or prompt.is_padded:
        return NO_PREFILL
    end = prompt.columns - 1  # generate must feed at least one token
    worth, spacing = costs.checkpoint_worth_tokens, costs.checkpoint_spacing_tokens
    if abilities.token_by_token:
        chunks: tuple[tuple[int, int], ...] = ()
        if begin:
            chunks = tuple((column, column + 1) for column in range(begin, end))
        elif cut == end >= worth:  # one token is left to continue with
            chunks = ((0, end),)
        return Prefill(chunks, frozenset({cut}))
    columns = {column for column in range(0, end, spacing) if begin < column <= end - spacing // 2}
    if cut - begin >= worth:
        columns = {column for column in columns if abs(column - cut) >= spacing // 2} | {cut}
    return Prefill(tuple(pairwise([begin, *sorted(columns)])), frozenset(columns))


@dataclass(frozen=True, slots=True, eq=False)
class TurnPlan:
    """The reused prefix of a turn, and the prefill of the rest.

    Attributes:
        columns: number of reused columns; 0 for none.
        rows: source of the first tokens of each row.
        first: the first column that sliding layers need.
        spans: spans that each row loads from the store.
        windows: spans of window blocks that each row loads, for sliding layers.
        checkpoints: block of each row whose states are loaded; empty when the layers already have the states.
        candidates: the known prefixes of the prompt.
        prefill: chunks and checkpoint columns of the rest.
        reason: why no more tokens are reused.
        decision: how the turn begins, and what that is expected to take.
        held: the reused columns that are on the device already.
        can_split: whether what follows them can be computed while the end of the prefix loads.
    """

    columns: int
    first: int
    rows: tuple[RowPlan, ...]
    spans: tuple[tuple[Span, ...], ...]
    windows: tuple[tuple[Span, ...], ...]
    checkpoints: tuple[BlockId, ...]
    candidates: Candidates
    prefill: Prefill
    reason: str | None
    decision: Decision
    held: int = 0
    can_split: bool = False

    @property
    def needs_store(self) -> bool:
        """Whether anything is loaded from the store."""
        return bool(self.checkpoints) or any(self.spans) or any(self.windows)


def plan(
    prompt: Prompt, candidates: Candidates, abilities: Abilities, costs: Costs, weighing: Weighing | None = None
) -> TurnPlan:
    """Return the plan that is expected to have ``prompt`` computed soonest; without ``weighing``, to reuse the most.

    What the buffers hold comes first. The whole prompt is never reused: the model must be fed at least one token.
    """
    rows = _row_plans(prompt, candidates)
    columns, checkpoints = candidates.columns, tuple[BlockId, ...]()
    if abilities.states:
        columns, checkpoints = _at_states(prompt, candidates, rows)
    if all(columns <= pad for pad in prompt.pads):
        columns, checkpoints = 0, ()
    reason = _why_less(candidates, columns, abilities)
    end = prompt.columns - 1
    if columns and abilities.token_by_token and columns < end:
        alone = (end - columns) * costs.single_pass_tokens
        if not (abilities.may_feed and alone <= columns):
            columns, checkpoints = 0, ()
            reason = "this model takes what follows a prefix token by token, which would take longer"
    held = _held_columns(prompt, candidates, rows, columns, abilities, in_place=not checkpoints)
    splits = _can_split(prompt, candidates, held, abilities)
    decision = Decision(LOAD if columns > held else HELD if columns else COMPUTE, columns)
    if weighing is not None and not columns:
        decision = decide(prompt.columns, 0, (), (), weighing.estimates, costs, may_split=False)
    elif weighing is not None:
        decision = _weighed(prompt, candidates, rows, columns, held, abilities, costs, weighing, splits=splits)
        if decision.columns != columns:
            columns, checkpoints = decision.columns, ()
            reason = _why_computed(decision)
    rows = tuple(_with_window(row, found, columns) for row, found in zip(rows, candidates.rows, strict=True))
    spans = tuple(
        found.match.between(row.device_tokens, columns - row.pad) if columns else ()
        for found, row in zip(candidates.rows, rows, strict=True)
    )
    windows = tuple(
        _window_spans(found, row, columns) if columns else () for found, row in zip(candidates.rows, rows, strict=True)
    )
    window = candidates.window
    return TurnPlan(
        columns,
        0 if window is None else first_column(prompt, columns, window),
        rows,
        spans,
        windows,
        checkpoints,
        candidates,
        plan_prefill(prompt, columns, candidates.known_columns, abilities, costs) if abilities.states else NO_PREFILL,
        reason,
        decision,
        held,
        splits,
    )


def _held_columns(
    prompt: Prompt,
    candidates: Candidates,
    rows: Sequence[RowPlan],
    columns: int,
    abilities: Abilities,
    *,
    in_place: bool,
) -> int:
    """Return up to which column the turn could begin with what the buffers hold, of the ``columns`` that are known."""
    held = min(columns, prompt.cut(min(row.pad + row.device_tokens for row in rows)))
    if abilities.states:
        held = columns if in_place and held == columns else 0
    for row, found in zip(rows, candidates.rows, strict=True):
        known, tokens = found.known_windows, held - row.pad
        if known is not None and tokens > 0 and not (known.from_held(tokens) and tokens <= known.held[1]):
            held = 0
    return held if any(held > row.pad for row in rows) else 0


def _weighed(
    prompt: Prompt,
    candidates: Candidates,
    rows: Sequence[RowPlan],
    columns: int,
    held: int,
    abilities: Abilities,
    costs: Costs,
    weighing: Weighing,
    *,
    splits: bool,
) -> Decision:
    """Return how much of the known ``columns`` is loaded, if what is ``held`` suffices otherwise."""
    stored = tuple(
        StoredRange(weighing.tiers.get(span.block.key, "disk"), row.pad + span.start, row.pad + span.stop)
        for row, found in zip(rows, candidates.rows, strict=True)
        for span in found.match.between(row.device_tokens, columns - row.pad)
    )
    cuts = {columns}
    if not abilities.states and candidates.window is None:  # those go on at some columns only
        cuts |= {
            prompt.last_admitted(a.end) for a, b in pairwise(stored) if a.tier != b.tier and held < a.end < columns
        }
    return decide(prompt.columns, held, sorted(cuts), stored, weighing.estimates, costs, may_split=splits)


def _can_split(prompt: Prompt, candidates: Candidates, held: int, abilities: Abilities) -> bool:
    """Return whether what follows the ``held`` columns could be computed while the end of the prefix loads.

    Everything after ``held`` must then be stored: what only the buffers of a row have beyond it is lost.
    """
    from_store = all(row.device_tokens == held for row in candidates.rows)
    return abilities.may_split and candidates.window is None and not prompt.is_padded and from_store


def _why_computed(decision: Decision) -> str:
    """Return why known columns are computed again."""
    soonest = f"{decision.seconds:.2g} s" if decision.seconds is not None else "less"
    loading = decision.others.get(LOAD)
    if decision.way == COMPUTE and loading is not None:
        return f"computing the prompt is expected to take {soonest}, loading what is known first {loading:.2g} s"
    return f"loading more than {decision.columns} columns is expected to take longer than to compute them"


def _with_window(row: RowPlan, found: RowCandidates, columns: int) -> RowPlan:
    """Return ``row`` with the tokens for which sliding layers take what they need from the held row."""
    known = found.known_windows
    if known is None or columns <= row.pad or not known.from_held(columns - row.pad):
        return row
    return replace(row, window_tokens=row.device_tokens)


def _window_spans(found: RowCandidates, row: RowPlan, columns: int) -> tuple[Span, ...]:
    """Return the spans of window blocks that sliding layers load for ``row``."""
    known = found.known_windows
    if known is None or columns <= row.pad:
        return ()
    begin = max(known.window.first_token(columns - row.pad), row.window_tokens)
    return PrefixMatch(found.windows, None).between(begin, columns - row.pad)


def _row_plans(prompt: Prompt, candidates: Candidates) -> tuple[RowPlan, ...]:
    resident = candidates.resident
    return tuple(
        RowPlan(
            pad,
            found.source_row,
            resident.pads[found.source_row] if resident else 0,
            found.device_tokens,
            pad + len(tokens),
        )
        for tokens, pad, found in zip(prompt.rows, prompt.pads, candidates.rows, strict=True)
    )


def _at_states(prompt: Prompt, candidates: Candidates, rows: Sequence[RowPlan]) -> tuple[int, tuple[BlockId, ...]]:
    """Return the last known column with known states of all rows, and the blocks with these states.

    There are no blocks when the layers already have the states. The column is 0 when there is none.
    """
    by_row = [dict(found.checkpoints) for found in candidates.rows]
    best = max(set.intersection(*map(set, by_row)), default=0)
    resident = candidates.resident
    live = resident.live if resident is not None and len(resident.rows) == len(rows) else None
    in_place = all(plan.source_row == row and plan.device_tokens == live for row, plan in enumerate(rows))
    if live is not None and best <= live <= candidates.columns and in_place and prompt.admits(live):
        return live, ()
    return best, tuple(checkpoints[best] for checkpoints in by_row) if best else ()


def _why_less(candidates: Candidates, columns: int, abilities: Abilities) -> str | None:
    """Return why fewer than the known columns are reused; None when all are."""
    if not columns and candidates.columns and abilities.states:
        return "the states of this model are not known within the known prefix"
    lost = candidates.known_columns - candidates.columns
    if lost:
        return (
            f"sliding layers keep only the tokens before some places, the last of them at column {candidates.columns}: "
            f"{lost} known columns after it are computed again"
        )
    if candidates.unasked:
        return "tiers below were not asked: finding and loading a prefix is expected to take longer than to compute it"
    return None if columns or any(candidates.known) else "no stored prefix matches the start of this prompt"
