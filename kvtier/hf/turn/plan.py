"""The plan of a turn: the longest prefix that buffers and store hold together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtier.errors import BlockError
from kvtier.hf.identity.fingerprint import Identity
from kvtier.hf.inputs.prompt import Prompt
from kvtier.hf.layers.prefix_load import PrefixLoad, RowPlan
from kvtier.hf.turn.turn import ResidentPrefix, Turn
from kvtier.report import Divergence
from kvtier.store import PrefixStore
from kvtier.store.chain import BlockId, TokenIds
from kvtier.store.load import LoadJob
from kvtier.store.lookup import Span

MakePrefix = Callable[[int, Sequence[RowPlan], LoadJob | None, int], PrefixLoad]


def plan_turn(
    prompt: Prompt,
    identity: Identity,
    resident: ResidentPrefix | None,
    store: PrefixStore,
    make_prefix: MakePrefix = PrefixLoad,
    *,
    states: bool = False,
) -> Turn:
    """Return the turn that reuses as much of ``prompt`` as can be, the buffers first.

    Never all of it: the model must still be fed one token. Blocks that turn out to be unusable are not found again, and
    what is left is planned with. A model with ``states`` can only go on from where they are known.
    """
    plans, from_device = [], []
    for row, (tokens, pad) in enumerate(zip(prompt.rows, prompt.pads, strict=True)):
        source, run = resident.best(tokens, row) if resident else (0, 0)
        plans.append(RowPlan(pad, source, resident.pads[source] if resident else 0, run, pad + len(tokens)))
        from_device.append(run)
    while True:
        # Where padding follows a row, it is fed that, and may be known as a whole.
        usable = [len(tokens) - (not prompt.ends_early(row)) for row, tokens in enumerate(prompt.rows)]
        matches = [store.match(identity.root, tokens, n) for tokens, n in zip(prompt.rows, usable, strict=True)]
        known = [min(n, max(w, m.length)) for w, m, n in zip(from_device, matches, usable, strict=True)]
        limits = [
            prompt.columns - 1 if prompt.ends_early(row) and n == usable[row] else prompt.pads[row] + n
            for row, n in enumerate(known)
        ]
        limit = min([prompt.columns - 1, *limits])
        columns = prompt.cut(limit)
        divergences = [
            _divergence(resident.rows[plan.source_row], tokens, plan.window_tokens)
            if resident and plan.window_tokens > match.length
            else match.divergence
            for plan, match, tokens in zip(plans, matches, prompt.rows, strict=True)
        ]
        checkpoints: Sequence[BlockId] = ()
        common = columns
        if states:
            columns, checkpoints = _at_states(prompt, identity.root, resident, plans, columns, store)
        if all(columns <= pad for pad in prompt.pads):
            return Turn(prompt, identity, None, divergences=divergences, known_columns=common, known=known, limit=limit)
        wanted = [m.between(w, columns - pad) for m, w, pad in zip(matches, from_device, prompt.pads, strict=True)]
        try:
            restore = store.restore(wanted, checkpoints) if checkpoints or any(wanted) else None
        except BlockError:
            continue  # what failed is not found again
        break
    prefix = make_prefix(columns, plans, restore, len(resident.rows) if resident else 0)
    turn = Turn(prompt, identity, prefix, divergences=divergences, known_columns=common, known=known, limit=limit)
    turn.cached_by_tier = _by_tier(prompt, columns, from_device, wanted, restore)
    return turn


def _at_states(
    prompt: Prompt,
    root: str,
    resident: ResidentPrefix | None,
    plans: Sequence[RowPlan],
    columns: int,
    store: PrefixStore,
) -> tuple[int, Sequence[BlockId]]:
    """Return the last column, not beyond ``columns``, after which the states of all rows are known.

    With it comes the snapshot of each row, none of which is padded; none when the layers are there already. 0 when no
    such column is known.
    """
    kept = [
        (each for each in store.checkpoints(root, tokens, columns) if prompt.admits(each[0])) for tokens in prompt.rows
    ]
    found = [next(kept[0], None)] if len(kept) == 1 else ()
    by_row = [dict(f for f in found if f)] if len(kept) == 1 else [dict(each) for each in kept]
    best = max(set.intersection(*map(set, by_row)), default=0)
    live = resident.live if resident is not None and len(resident.rows) == len(plans) else None
    in_place = all(plan.source_row == row and plan.window_tokens == live for row, plan in enumerate(plans))
    if live is not None and best <= live <= columns and in_place and prompt.admits(live):
        return live, ()
    return best, [checkpoints[best] for checkpoints in by_row] if best else ()


def _divergence(known: TokenIds, tokens: TokenIds, common: int) -> Divergence | None:
    """Return where ``tokens`` leave ``known`` after ``common`` tokens; None when one of them just ends."""
    if common == min(len(known), len(tokens)):
        return None
    return Divergence(common, int(known[common]), int(tokens[common]))


def _by_tier(
    prompt: Prompt,
    columns: int,
    from_device: Sequence[int],
    wanted: Sequence[Sequence[Span]],
    restore: LoadJob | None,
) -> dict[str, int]:
    counts = {"device": sum(min(w, max(0, columns - pad)) for w, pad in zip(from_device, prompt.pads, strict=True))}
    if restore is not None:
        for span in (span for spans in wanted for span in spans):
            tier = restore.tier(span.block.key)
            counts[tier] = counts.get(tier, 0) + span.tokens
    return counts
