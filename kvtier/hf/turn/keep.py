"""The commit of a turn's rows to the store, with the known states of its model; and of what the turn took."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from kvtier.costs.book import CostBook
from kvtier.errors import ClosedError, StreamError
from kvtier.hf.inputs.prompt import ResidentPrefix
from kvtier.hf.layers.container import LayerContainer
from kvtier.hf.layers.dropped import DroppedColumns
from kvtier.hf.layers.row_pages import RowPages
from kvtier.hf.layers.state_checkpoints import StateCheckpoints
from kvtier.hf.turn.turn import Turn
from kvtier.hf.turn.windows import common, merged
from kvtier.kv.base import LayerMemory
from kvtier.kv.page import Page
from kvtier.kv.window import Range
from kvtier.progress import COMMIT, Progress, Task
from kvtier.store import PrefixStore
from kvtier.store.block import arrived
from kvtier.store.commit import Read, Windows

_log = logging.getLogger("kvtier.hf")


def keep(
    named: ResidentPrefix,
    turn: Turn,
    layers: LayerContainer,
    checkpoints: StateCheckpoints,
    store: PrefixStore,
    *,
    whole: bool,
    weighs: bool,
    progress: Progress | None = None,
) -> ResidentPrefix | None:
    """Commit the tokens whose K and V every buffer holds, and return them; None where the layers must be emptied.

    ``named`` are the tokens in the rows of the layers. ``whole``: no forward pass of the turn was interrupted.
    ``weighs``: turns compute what takes longer to load. ``progress`` is told which tokens the store has.
    """
    assert turn.identity is not None
    filled = layers.filled
    if not all(layer.complete and layer.rows == len(named.rows) for layer in filled):
        return None
    length = layers.common_columns
    for layer in filled:  # an interrupt may have left some layers a step ahead
        layer.length = length
    resident = named.cut(length)
    states = _states_of_rows(layers, checkpoints, resident, turn, length, whole) if layers.states else None
    memories = [layer.memory for layer in layers.attention]
    try:
        if any(memory is not None and memory.spec.v_dtype is not None for memory in memories):
            _log.warning("this turn is not kept in the store: K and V of a layer have different dtypes")
        else:
            _commit(resident, turn, memories, states, layers, store, weighs=weighs, progress=progress)
        for _, layer in layers.sliding:
            layer.drop_at_rest()
    except StreamError as error:
        _log.warning("this turn is not kept: %s", error)
        return None
    except (ClosedError, MemoryError, torch.OutOfMemoryError) as error:
        # The answer exists: failing to store the turn must not lose it.
        _log.warning("this turn is not kept in the store: %s", error)
    return replace(resident, live=checkpoints.live)


def note_costs(book: CostBook, turn: Turn, token_bytes: int) -> None:
    """Note in ``book`` what the passes and loads of ``turn`` took; ``token_bytes`` are those of K and V."""
    if token_bytes and token_bytes != book.token_bytes:
        book.token_bytes = float(token_bytes)
        book.news += 1
    for sample in turn.clock.samples() if turn.clock is not None else ():
        book.note_pass(sample, alone=turn.meeting is None)
    if turn.meeting is not None:
        loads = turn.meeting.fetch.samples()
    else:
        job = turn.prefix.job if turn.prefix is not None else None
        loads = job.samples() if job is not None else {}
        if job is None and turn.clock is not None:
            book.note_around(turn.clock.around_seconds)
    for tier, load in loads.items():
        book.note_load(tier, load)
    if turn.meeting is not None:
        turn.meeting.fetch.when_late(book.note_load)
    book.prefill()  # fitted now, not while the next turn waits for its first token


def _commit(
    resident: ResidentPrefix,
    turn: Turn,
    memories: Sequence[LayerMemory | None],
    states: Sequence[dict[int, torch.Tensor]] | None,
    layers: LayerContainer,
    store: PrefixStore,
    *,
    weighs: bool,
    progress: Progress | None,
) -> None:
    """Commit each row; beside an accelerator, pages arrive later."""
    identity, length, dropped = turn.identity, layers.common_columns, layers.dropped
    assert identity is not None
    sliding = [number for number, _ in layers.sliding]
    gather = layers.gather(memories)
    arrive = arrived if gather is None else gather.wait
    prompt_rows = turn.prompt_rows(len(resident.rows))
    task = progress.begin(COMMIT, sum(map(len, resident.rows)), "tokens") if progress is not None else None
    try:
        for row, (tokens, pad) in enumerate(zip(resident.rows, resident.pads, strict=True)):
            pages = RowPages(memories, sliding, dropped, row, prompt_rows[row], pad, gather)
            windows = None
            if sliding and dropped is not None:
                windows = Windows(_window_spans(pages, len(tokens), length, dropped), pages.read_window)
            of_row = states[row] if states else None
            read = pages.read if task is None else partial(_read_and_tell, pages.read, task, task.done)
            store.commit(identity.root, tokens, read, identity.manifest, of_row, arrive, windows, weighs=weighs)
            if task is not None:
                task.to(sum(map(len, resident.rows[: row + 1])))
    finally:
        if task is not None:
            task.end(complete=False)
        if gather is not None:
            gather.launch()


def _read_and_tell(read: Read, task: Task, before: int, start: int, stop: int) -> tuple[Page, ...]:
    """Return the pages of the tokens ``[start, stop)`` of a row; the store has those before them by now."""
    task.to(before + start)
    return read(start, stop)


def _window_spans(pages: RowPages, tokens: int, columns: int, dropped: DroppedColumns) -> tuple[Range, ...]:
    """Return the tokens of a row of which all sliding layers have pages that are worth keeping."""
    known = dropped.worth_keeping(columns)
    for layer in pages.sliding:
        known = common(known, merged(pages.ranges(layer, columns)))
    return tuple((max(0, a - pages.pad), min(b - pages.pad, tokens)) for a, b in known if b > pages.pad)


def _states_of_rows(
    layers: LayerContainer,
    checkpoints: StateCheckpoints,
    resident: ResidentPrefix,
    turn: Turn,
    length: int,
    whole: bool,
) -> list[dict[int, torch.Tensor]]:
    """Return the known states of each row, by the number of tokens after which they are valid.

    No row is padded: models with states do not admit padded prompts.
    """
    by_row = []
    live = whole
    for row, prompt_row in enumerate(turn.prompt_rows(len(resident.rows))):
        states = checkpoints.of(prompt_row)
        at_end = whole and len(resident.rows[row]) == length
        if at_end and turn.keeps_answer_states and length not in states:
            last = checkpoints.take_last(layers.states, row)
            if last is not None:
                states[length] = last
        live = live and at_end and length in states
        by_row.append({column: blob for column, blob in states.items() if column <= length})
    checkpoints.lose()
    checkpoints.live = length if live else None
    return by_row
