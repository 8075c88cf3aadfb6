"""The start of a turn: its plan, the opened blocks, and the layers that wait for their parts of the prefix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedModel

from kvtier.errors import BlockError
from kvtier.hf.compat.model_profiles import profile_of
from kvtier.hf.identity.fingerprint import Identity
from kvtier.hf.inputs.prompt import Prompt
from kvtier.hf.inputs.request import GenerateRequest
from kvtier.hf.layers.container import LayerContainer
from kvtier.hf.layers.offloaded_load import OffloadedPrefixLoad
from kvtier.hf.layers.prefix_load import PrefixLoad
from kvtier.hf.layers.state_checkpoints import StateCheckpoints
from kvtier.hf.layers.states import UnreadableError
from kvtier.hf.turn.admission import is_spread
from kvtier.hf.turn.candidates import ResidentPrefix, find_candidates
from kvtier.hf.turn.cost import Costs
from kvtier.hf.turn.plan import Abilities, plan
from kvtier.hf.turn.token_trace import TokenTrace
from kvtier.hf.turn.turn import Turn
from kvtier.store import PrefixStore


def planned_turn(
    model: PreTrainedModel,
    prompt: Prompt,
    identity: Identity,
    request: GenerateRequest,
    resident: ResidentPrefix | None,
    layers: LayerContainer,
    store: PrefixStore,
    costs: Costs,
) -> Turn:
    """Return the turn that reuses the longest known prefix that can be opened now.

    Args:
        model: the model of the turn.
        prompt: the prompt of the turn.
        identity: identity of the model.
        request: the request of the call.
        resident: the tokens that the layers hold.
        layers: layers of the cache.
        store: store of the prefixes.
        costs: costs that the plan compares.
    """
    profile, states = profile_of(model), bool(layers.states)
    abilities = Abilities(states, profile.token_by_token, request.feeds and request.repeats == 1 and prompt.plain)
    while True:
        candidates = find_candidates(prompt, identity.root, resident, store, states=states)
        planned = plan(prompt, candidates, abilities, costs)
        try:
            job = store.restore(planned.spans, planned.checkpoints) if planned.needs_store else None
        except BlockError:
            continue  # later lookups skip the failed blocks
        break
    prefix = None
    if planned.columns:
        held_rows = len(resident.rows) if resident else 0
        prefix = _prefix_kind(model, layers)(planned.columns, planned.rows, job, held_rows)
        prefix.overlap_bytes_per_second = costs.overlap_bytes_per_second
    turn = Turn.planned(prompt, identity, prefix, planned, job)
    turn.keeps_answer_states = not (states and profile.decodes_otherwise)
    if request.watched and prompt.plain:
        turn.trace = TokenTrace(prompt, planned.columns)
    return turn


def _prefix_kind(model: PreTrainedModel, layers: LayerContainer) -> Callable[..., PrefixLoad]:
    if layers.offload is None:
        return PrefixLoad
    return partial(OffloadedPrefixLoad, layers.offload, None if is_spread(model) else model.device)


def start_load(
    turn: Turn,
    prefix: PrefixLoad,
    layers: LayerContainer,
    checkpoints: StateCheckpoints,
    model: PreTrainedModel | None,
    repeats: int,
) -> None:
    """Start loading a prefix; each layer waits for its own pages in its next update.

    Args:
        turn: the turn that begins.
        prefix: the prefix that the turn reuses.
        layers: layers of the cache.
        checkpoints: state checkpoints of the cache.
        model: the model of the turn.
        repeats: how many rows of the cache continue each row of the prompt.

    Raises:
        BlockError: blocks do not fit the layers; later lookups skip them.
    """
    attention = layers.attention
    assert turn.prompt is not None
    try:
        if model is not None:
            prefix.repeats, prefix.device = repeats, model.device
        prefix.start([layer.memory for layer in attention], turn.prompt.columns)
        for index, layer in enumerate(attention):
            layer.expect(prefix, index)
        if layers.states and model is not None:
            _start_states(prefix, layers, checkpoints, model, repeats)
    except BaseException:
        prefix.close()
        raise


def _start_states(
    prefix: PrefixLoad, layers: LayerContainer, checkpoints: StateCheckpoints, model: PreTrainedModel, repeats: int
) -> None:
    if not prefix.has_states:
        checkpoints.go_on(layers.states, repeats)
        return
    try:
        checkpoints.put(layers.states, prefix.states(), model.device, repeats)
    except UnreadableError as error:
        raise prefix.reject(f"the states of a checkpoint cannot be used: {error}") from error
