"""The start of a turn: its admission, its plan, the opened blocks, and the layers that wait for their parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from kvtier.costs.book import CostBook
from kvtier.errors import BlockError
from kvtier.hf.compat.canary import why_untrusted
from kvtier.hf.compat.model_profiles import profile_of, why_not_so, why_off
from kvtier.hf.identity.fingerprint import Identity
from kvtier.hf.inputs.prompt import Prompt, ResidentPrefix
from kvtier.hf.inputs.request import GenerateRequest
from kvtier.hf.layers.attention import SlidingWindowLayer
from kvtier.hf.layers.container import LayerContainer
from kvtier.hf.layers.dropped import DroppedColumns
from kvtier.hf.layers.loads.offloaded_load import OffloadedPrefixLoad
from kvtier.hf.layers.loads.prefix_load import PrefixLoad, RowPlan
from kvtier.hf.layers.loads.staged_load import StagedPrefixLoad
from kvtier.hf.layers.state_checkpoints import StateCheckpoints
from kvtier.hf.layers.states import UnreadableError
from kvtier.hf.not_reusable import NotReusable
from kvtier.hf.turn.candidates import Candidates, find_candidates
from kvtier.hf.turn.choice.decision import BOTH, LOAD, StoredRange, decide
from kvtier.hf.turn.choice.estimates import estimates_for
from kvtier.hf.turn.choice.meeting import Meeting
from kvtier.hf.turn.cost import Costs
from kvtier.hf.turn.plan import Abilities, TurnPlan, Weighing, plan
from kvtier.hf.turn.token_trace import TokenTrace
from kvtier.hf.turn.turn import MakeLoad, Turn
from kvtier.hf.turn.windows import wanted_columns
from kvtier.store import PrefixStore
from kvtier.store.reading.load import LoadJob
from kvtier.transfer.base import CopyEngine


def admit(model: PreTrainedModel, request: GenerateRequest, layers: LayerContainer) -> Prompt | NotReusable:
    """Return the prompt of a turn that may reuse and be kept, otherwise the reason against both.

    ``layers`` are laid out for the model.
    """
    prompt, states = request.prompt, bool(layers.states)
    reason = request.off
    lasting = why_untrusted() or (reason if request.lasts else None)
    if not reason and not lasting:
        lasting = _why_never(model, layers)
    if lasting:
        return NotReusable(lasting, lasts=True)
    if prompt is not None and not reason and states and prompt.is_padded:  # K and V then depend on the padding too
        reason = "padding would go into the states of this model"
    if prompt is not None and not reason:
        reason = why_not_so(model, prompt.columns, prompt.is_padded, request.longest_answer)
    if prompt is None or reason or prompt.columns == 0 or not prompt.rows:
        return NotReusable(reason or "the prompt is empty")
    if states and is_spread(model):
        return NotReusable("states of layers on several devices are not restored", lasts=True)
    return prompt


def _why_never(model: PreTrainedModel, layers: LayerContainer) -> str | None:
    """Return why no turn of ``model`` may reuse; None when turns may."""
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        return "the model has no config"
    return layers.no_reuse or why_off(model)


def why_cold(prompt: Prompt, request: GenerateRequest, layers: LayerContainer) -> str | None:
    """Return why a turn must not start from a known prefix, though its tokens may be kept; None when it may."""
    if request.cold is None and _hides_rows(prompt, layers):
        return "right padding fills the whole sliding window, so that a row's last tokens are not visible"
    return request.cold


def is_spread(model: PreTrainedModel) -> bool:
    """Return whether the layers of ``model`` are on several devices."""
    devices: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    return len(set(devices.values())) > 1


def _hides_rows(prompt: Prompt, layers: LayerContainer) -> bool:
    """Whether right padding may hide all tokens of a row from the last column: the answer then depends on chunking."""
    trailing = max(prompt.columns - pad - len(row) for row, pad in zip(prompt.rows, prompt.pads, strict=True))
    if trailing <= 0:
        return False
    text = layers.config.get_text_config(decoder=True) if layers.config is not None else None
    widths = [layer.sliding_window for layer in layers.attention if isinstance(layer, SlidingWindowLayer)]
    return bool(widths) and (trailing >= min(widths) or bool(getattr(text, "attention_chunk_size", None)))


def planned_turn(
    model: PreTrainedModel,
    prompt: Prompt,
    identity: Identity,
    request: GenerateRequest,
    resident: ResidentPrefix | None,
    layers: LayerContainer,
    store: PrefixStore,
    costs: Costs,
    book: CostBook | None,
) -> Turn:
    """Return the turn that begins with what is known, as soon as its prompt is expected to be computed.

    It reuses the longest known prefix that can be opened now; with a ``book`` of costs only what pays.
    """
    profile, states = profile_of(model), bool(layers.states)
    feeds = request.feeds and request.repeats == 1 and prompt.plain
    splits = feeds and not states and not request.watched and request.ids is not None
    abilities = Abilities(states, profile.token_by_token, feeds, splits)
    rows = len(prompt.rows) * request.repeats
    asks_below = partial(_asks_below, model, prompt, store, book, rows, costs) if book is not None else None
    while True:
        candidates = find_candidates(
            prompt, identity.root, resident, store, states=states, window=layers.window, asks_below=asks_below
        )
        weighing = _weighing(model, candidates, store, book, rows) if book is not None else None
        planned = plan(prompt, candidates, abilities, costs, weighing)
        try:
            job = store.restore(planned.spans, planned.checkpoints, planned.windows) if planned.needs_store else None
        except BlockError:
            continue  # later lookups skip the failed blocks
        break
    held_rows = len(resident.rows) if resident else 0
    decision = planned.decision
    from_below = weighing is not None and bool(set(weighing.tiers.values()) - {"host", "disk"})
    watched = planned.can_split and (decision.load_seconds > costs.watched_load_seconds or from_below)
    if (decision.way == BOTH or watched) and job is not None and weighing is not None:
        make = partial(_prefix, model, request, layers, costs)
        turn = _fronted_turn(prompt, identity, planned, job, store, weighing, costs, make)
        if planned.held:
            turn.prefix = make(planned.held, 0, planned.rows, None, held_rows)
    else:
        prefix = None
        if planned.columns:
            prefix = _prefix(
                model, request, layers, costs, planned.columns, planned.first, planned.rows, job, held_rows
            )
            if weighing is not None:
                computing = weighing.estimates.compute_seconds(planned.held, planned.columns)
                prefix.patience_seconds = max(costs.least_patience_seconds, computing)
        turn = Turn.planned(prompt, identity, prefix, planned, job)
    turn.keeps_answer_states = not (states and profile.decodes_otherwise)
    if request.watched and prompt.plain:
        turn.trace = TokenTrace(prompt, planned.columns)
    return turn


def _prefix(
    model: PreTrainedModel,
    request: GenerateRequest,
    layers: LayerContainer,
    costs: Costs,
    columns: int,
    first: int,
    rows: Sequence[RowPlan],
    job: LoadJob | None,
    held_rows: int,
) -> PrefixLoad:
    kind: Callable[..., PrefixLoad] = PrefixLoad
    if layers.offload is not None:
        kind = partial(OffloadedPrefixLoad, layers.offload, None if is_spread(model) else model.device)
    elif (engine := _engine(model, layers)) is not None:
        kind = partial(StagedPrefixLoad, engine, layers.room)
    prefix = kind(columns, first, rows, job, held_rows)
    prefix.repeats, prefix.device = request.repeats, model.device
    prefix.overlap_bytes_per_second = costs.overlap_bytes_per_second
    return prefix


def _asks_below(
    model: PreTrainedModel,
    prompt: Prompt,
    store: PrefixStore,
    book: CostBook,
    rows: int,
    costs: Costs,
    known_tokens: int,
) -> bool:
    """Whether it could pay to ask the tiers below, if they had all of the prompt: the question takes time, too."""
    lower = store.lookup_below()
    if lower is None:
        return True
    name, lookup_seconds = lower
    lookup_seconds = lookup_seconds or book.lookup_seconds(name)
    estimates = estimates_for(model, book, {name}, rows, store.block_size)
    if estimates is None:
        return True
    end = prompt.columns
    best = decide(
        end, known_tokens, [end - 1], [StoredRange(name, known_tokens, end - 1)], estimates, costs, may_split=True
    )
    computing = estimates.around_seconds + estimates.compute_seconds(known_tokens, end)
    gains = best.seconds is not None and best.seconds + lookup_seconds < costs.asking_share * computing
    return gains or known_tokens >= end - 1


def _weighing(
    model: PreTrainedModel, candidates: Candidates, store: PrefixStore, book: CostBook, rows: int
) -> Weighing | None:
    """Return what the candidates are weighed by; None where too little is known of costs.

    A cost is only guessed, by a probe, where something is stored that could be loaded.
    """
    spans = [
        span
        for found in candidates.rows
        for span in (*found.match.spans, *found.windows)
        if span.stop > found.device_tokens
    ]
    if not spans and not book.knows_passes:
        return None
    tiers = store.where(spans) if spans else {}
    estimates = estimates_for(model, book, {*tiers.values(), "disk"}, rows, store.block_size)
    return Weighing(estimates, tiers) if estimates is not None else None


def _fronted_turn(
    prompt: Prompt,
    identity: Identity,
    planned: TurnPlan,
    job: LoadJob,
    store: PrefixStore,
    weighing: Weighing,
    costs: Costs,
    make: MakeLoad,
) -> Turn:
    """Return a turn that computes the front of a prefix while its end loads from the back.

    If it was decided to load all of it, nothing is computed unless that takes much longer than was expected.
    """
    turn = Turn.planned(prompt, identity, None, planned, None)
    decision, begin = planned.decision, planned.held
    missing = planned.columns - begin
    seconds = decision.load_seconds * missing / max(1, planned.columns - max(begin, decision.meeting))
    patience = seconds * costs.watched_load_times if decision.way == LOAD else 0.0
    fetch = store.fetch_from_the_back(job)
    turn.meeting = Meeting(fetch, begin, planned.columns, weighing.estimates, seconds, costs, patience)
    turn.make_load = make
    return turn


def _engine(model: PreTrainedModel, layers: LayerContainer) -> CopyEngine | None:
    """Return the engine that loads pages to the model's device; None where they are read into the buffers directly."""
    if is_spread(model) or model.device.type == "meta":
        return None
    return layers.side_engine(model.device)


def start_load(prefix: PrefixLoad, columns: int, layers: LayerContainer, checkpoints: StateCheckpoints) -> None:
    """Start loading a prefix of a prompt of ``columns``; each layer waits for its own pages in its next update.

    Raises:
        BlockError: blocks do not fit the layers; later lookups skip them.
    """
    attention = layers.attention
    try:
        windows = [layer.window if isinstance(layer, SlidingWindowLayer) else None for layer in attention]
        prefix.start([layer.memory for layer in attention], windows, columns)
        for index, layer in enumerate(attention):
            layer.expect(prefix, index)
        if layers.states:
            _start_states(prefix, layers, checkpoints)
    except BaseException:
        prefix.close()
        raise


def dropped_columns(turn: Turn, layers: LayerContainer, costs: Costs) -> DroppedColumns | None:
    """Return what takes the columns that sliding layers drop in ``turn``; None if nothing of it can be kept."""
    window, prompt = layers.window, turn.prompt
    if window is None or prompt is None or turn.identity is None:
        return None
    branch = turn.plan.candidates.known_columns if turn.plan is not None else 0
    wanted = wanted_columns(prompt, turn.reused_columns, branch, window, costs)
    recent = window.block_tokens + costs.window_margin_tokens
    at_end = window.needed + recent
    return DroppedColumns(wanted, recent, at_end, prompt.columns, turn.prompt_rows, layers.side_engine)


def _start_states(prefix: PrefixLoad, layers: LayerContainer, checkpoints: StateCheckpoints) -> None:
    if not prefix.has_states:
        checkpoints.go_on(layers.states, prefix.repeats)
        return
    try:
        checkpoints.put(layers.states, prefix.states(), prefix.device, prefix.repeats)
    except UnreadableError as error:
        raise prefix.reject(f"the states of a checkpoint cannot be used: {error}") from error
