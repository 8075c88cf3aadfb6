"""TurnManager: begins turns with what is known, and keeps what is new."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from kvtier.errors import BlockError, ClosedError, PromptError, StreamError, UnannouncedError
from kvtier.hf.compat.canary import why_untrusted
from kvtier.hf.compat.model_profiles import profile_of, why_not_so, why_off
from kvtier.hf.compat.names import decoder_cache
from kvtier.hf.identity.fingerprint import identify
from kvtier.hf.inputs.continued import media_error
from kvtier.hf.inputs.prompt import Prompt
from kvtier.hf.inputs.request import GenerateRequest
from kvtier.hf.layers.attention import SlidingWindowLayer
from kvtier.hf.layers.container import LayerContainer, host_pages
from kvtier.hf.layers.layer_marks import LayerMarks
from kvtier.hf.layers.offloaded_load import OffloadedPrefixLoad
from kvtier.hf.layers.prefix_load import PrefixLoad
from kvtier.hf.layers.state_checkpoints import StateCheckpoints
from kvtier.hf.layers.states import UnreadableError
from kvtier.hf.not_reusable import NotReusable
from kvtier.hf.turn.exclusive_use import check_wrapped, checked_wait_seconds, is_serving, running_generate
from kvtier.hf.turn.plan import MakePrefix, plan_turn
from kvtier.hf.turn.prefill_plan import plan_pieces
from kvtier.hf.turn.token_trace import TokenTrace
from kvtier.hf.turn.turn import ResidentPrefix, Turn
from kvtier.report import TurnReport
from kvtier.store import PrefixStore
from kvtier.store.chain import TokenIds

_log = logging.getLogger("kvtier.hf")

_UNANNOUNCED = (
    "a generate() that kvtier did not see feeds this cache, which holds tokens of another call. Take model.generate "
    "after making the TieredCache, call reset() before each call, or feed the model in a loop with begin() and "
    "commit(). If that was not it, kvtier does not know this version of transformers"
)


class TurnManager:
    """The turns of one cache: what each begins with, what happens to the layers meanwhile, and what is kept of it.

    Guarantees: what a turn begins with belongs to its prompt, or nothing does; whatever ends a turn, the layers then
    hold tokens that are known, or nothing.

    Args:
        layers: of the cache.
        store: where prefixes are kept.
        wait_seconds: how long a call waits for one that is using the cache on another thread.

    Attributes:
        layers: of the cache.
        store: where prefixes are kept.
        wait_seconds: see above.
        last_turn: the report of the last turn that has begun; None before the first.
        closed: whether the cache was closed.

    Raises:
        ConfigurationError: ``wait_seconds`` is no number of seconds.
    """

    def __init__(self, layers: LayerContainer, store: PrefixStore, wait_seconds: float = 0.0) -> None:
        self.layers = layers
        self.store = store
        self.wait_seconds = checked_wait_seconds(wait_seconds)
        self.last_turn: TurnReport | None = None
        self.closed = False
        self._turn: Turn | None = None
        self._resident: ResidentPrefix | None = None
        self._checkpoints = StateCheckpoints()
        self._root: str | None = None
        self._marks: LayerMarks | None = None
        self._is_strict = False
        self._unseen_generate: FrameType | None = None  # the call itself: a number could be given to a later one
        self._longest_answer = 0

    # --- layers -----------------------------------------------------------------------------------------------------

    def lay_out(self, config: PreTrainedConfig | None) -> None:
        """Hold nothing, and have empty layers for a model."""
        self.layers.lay_out(config if why_untrusted() is None else None)  # there, layers might not even be made
        self._resident = None
        self._checkpoints.lose()

    def appending(self, index: int, layer: Any, columns: int) -> None:
        """Note that a layer is about to be given ``columns`` more.

        Raises:
            BusyError: something else than the running ``generate()`` has changed the layer.
            ClosedError: the cache was closed.
            UnannouncedError: no turn has begun, and a ``generate()`` is running that kvtier did not see.
            UninstalledError: ``uninstall()`` was called, and no turn has begun.
        """
        turn = self._turn
        if turn is None:
            self._feed_unannounced()
        else:
            turn.appending(index, layer.get_seq_length(), columns)

    def changing_states(self) -> None:
        """Note that a model is about to change states: models without attention come here alone.

        Raises:
            ClosedError: the cache was closed.
            UnannouncedError: no turn has begun, and a ``generate()`` is running that kvtier did not see.
            UninstalledError: ``uninstall()`` was called, and no turn has begun.
        """
        if self._turn is None:
            self._feed_unannounced()

    def _feed_unannounced(self) -> None:
        """Prepare for tokens that no turn has announced: in a loop of one's own they are fine, in ``generate()`` not.

        A ``generate()`` that kvtier did not see takes what the cache holds for the beginning of its prompt. One that
        finds the cache empty is right, as long as it is the same call.
        """
        self.check_open()
        check_wrapped()
        running = running_generate()
        holds_tokens = self._resident is not None or bool(self.layers.columns)
        if running is not None and running is not self._unseen_generate and holds_tokens:
            raise UnannouncedError(_UNANNOUNCED)
        self._unseen_generate = running
        self._resident = None  # tokens without a name

    def start_over(self) -> None:
        """Hold nothing, and forget the turn."""
        self._unseen_generate = None
        self._end_turn()
        self.lay_out(self.layers.config)

    def cropping(self) -> None:
        """Note that tokens are about to be taken back from every layer."""
        self._checkpoints.live = None

    def cropped(self) -> None:
        """Note that tokens were taken back from every layer."""
        if self._turn is not None:
            ends = {index: self.layers.layers[index].get_seq_length() for index in self._turn.ends}
            self._turn.cropped(self.layers.columns, ends)

    def move_rows(self, rows: torch.Tensor, move: Callable[[Any], None]) -> None:
        """Let row ``i`` of every layer be its former row ``rows[i]``; ``move`` does it for one layer with K and V."""
        before, turn = self.layers.row_count, self._turn
        # Until every layer has moved, an interrupt leaves rows that differ between layers: nothing of it can be kept.
        self._turn, self._resident = (Turn.off("rows were being moved") if turn else None), None
        self.layers.move_rows(rows, move)
        self._turn = turn
        if turn is not None:
            turn.rows_moved(rows, before)

    # --- a turn -----------------------------------------------------------------------------------------------------

    def begin(self, model: PreTrainedModel, request: GenerateRequest) -> TurnReport:
        """Begin a turn of ``model``, whose pages may still be on their way.

        Raises:
            ClosedError: the cache was closed.
            PromptError: media of the prompt were not passed, and the turn does not begin with them.
        """
        self.check_open()
        self._longest_answer = request.longest_answer
        # These take tokens back, or may do anything. Of calls whose arguments were not read, nothing is known.
        self._is_strict = is_serving(self) and request.ids is not None and request.cold is None and not request.custom
        self.abort()
        start = partial(self._start_request, request)
        prompt, off = request.prompt, why_untrusted() or request.off
        config = getattr(model, "config", None)
        if not isinstance(config, PreTrainedConfig):
            off = off or "the model has no config"
        elif not self.layers.fits(config):
            self.lay_out(config)
        off = off or self.layers.no_reuse or (why_off(model) if config is not None else None)
        states = bool(self.layers.states)
        if prompt is not None and not off and states and prompt.is_padded:  # then K and V depend on it as well
            off = "padding would go into the states of this model"
        if prompt is not None and not off:
            off = why_not_so(model, prompt.columns, prompt.is_padded, request.longest_answer)
        if prompt is None or off or prompt.columns == 0 or not prompt.rows:
            return start(Turn.off(off or "the prompt is empty"))
        started = time.perf_counter()
        tokens = np.unique(np.concatenate(prompt.rows))
        identity = identify(model, self.store.namespace, self.store.block_size, tokens)
        if isinstance(identity, NotReusable):
            return start(Turn.off(identity.reason))
        changed = self._root is not None and identity.root != self._root
        if changed:
            self.lay_out(self.layers.config)
        self._root = identity.root
        if states and self._is_spread(model):
            return start(Turn.off("states of layers on several devices are not restored"))
        cold = request.cold
        if self._hides_rows(prompt):
            cold = cold or "right padding fills the whole sliding window, so that a row's last tokens are not visible"
        if cold:
            if states:
                return start(Turn.off(cold))  # drafts that were taken back would still be in the states
            trace = TokenTrace(prompt) if request.watched and prompt.plain else None
            return start(Turn(prompt, identity, None, cold, prompt_only=True, trace=trace, custom=request.custom))
        while True:
            turn = plan_turn(prompt, identity, self._resident_now(), self.store, self._prefix_for(model), states=states)
            turn.match_seconds = time.perf_counter() - started
            if turn.prefix is None:
                if not any(turn.known):
                    turn.reason = "no stored prefix matches the start of this prompt"
                if changed:
                    turn.reason = "the model is not the one that filled this cache"
                elif turn.known_columns and states:
                    turn.reason = "the states of this model are not known within the known prefix"
            if states:
                turn.keeps_answer_states = not profile_of(model).decodes_otherwise
                may_feed = request.feeds and request.repeats == 1 and prompt.plain
                plan_pieces(turn, token_by_token=profile_of(model).token_by_token, may_feed=may_feed)
            if request.watched and prompt.plain:
                turn.trace = TokenTrace(prompt, turn.prefix.columns if turn.prefix is not None else 0)
            try:
                return start(turn, model, request.repeats)
            except BlockError:
                continue  # blocks that do not fit the model: they are withheld

    def resident(self) -> ResidentPrefix | None:
        """Return the tokens of the last turn whose K and V the cache holds; None when there are none.

        Raises:
            ClosedError: the cache was closed.
        """
        self.check_open()
        self.abort()
        return self._resident_now()

    def _start_request(
        self, request: GenerateRequest, turn: Turn, model: PreTrainedModel | None = None, repeats: int = 1
    ) -> TurnReport:
        """Start the ``turn`` of a ``request``.

        Raises:
            PromptError: media of the call's prompt were not passed, and the turn does not begin with them.
        """
        needed = request.prompt.needed if request.prompt is not None else 0
        if needed > (turn.prefix.columns if turn.prefix is not None else 0):
            reason = turn.reason or "the turn would begin before the last of it entered"
            if turn.prefix is not None:
                turn.prefix.close()
            if request.inputs is not None:
                raise media_error(request.missing, reason)
            turn = Turn.off(f"the cache holds media that the loop would have to feed again: {reason}")
        return self._start(turn, model, repeats)

    @staticmethod
    def _is_spread(model: PreTrainedModel) -> bool:
        """Whether the layers of ``model`` are on several devices."""
        return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1

    def _prefix_for(self, model: PreTrainedModel) -> MakePrefix:
        if self.layers.offload is None:
            return PrefixLoad
        return partial(OffloadedPrefixLoad, self.layers.offload, None if self._is_spread(model) else model.device)

    def _hides_rows(self, prompt: Prompt) -> bool:
        """Whether the last column of a row sees none of its tokens: what comes then depends on how it was fed."""
        trailing = max(prompt.columns - pad - len(row) for row, pad in zip(prompt.rows, prompt.pads, strict=True))
        if trailing <= 0:
            return False
        text = self.layers.config.get_text_config(decoder=True) if self.layers.config is not None else None
        widths = [layer.sliding_window for layer in self.layers.attention if isinstance(layer, SlidingWindowLayer)]
        return bool(widths) and (trailing >= min(widths) or bool(getattr(text, "attention_chunk_size", None)))

    def _resident_now(self) -> ResidentPrefix | None:
        """Return what all buffers hold, cut to their length: a crop between turns shortens it.

        None where anything else has changed a layer since, by whatever way.
        """
        if (
            self._resident is None
            or not self.layers.layers
            or self._marks is None
            or not self._marks.still_hold(self.layers.layers)
        ):
            return None
        if not self.layers.attention:
            return self._resident
        lengths = {layer.length for layer in self.layers.filled}
        if len(lengths) != 1 or not all(layer.complete for layer in self.layers.filled):
            return None
        return self._resident.cut(lengths.pop())

    def _start(self, turn: Turn, model: PreTrainedModel | None = None, repeats: int = 1) -> TurnReport:
        self._resident = self._unseen_generate = None  # first of all: from here on, pages may land in the buffers
        if turn.prefix is None:
            self.lay_out(self.layers.config)
        else:
            layers = self.layers.attention
            assert turn.prompt is not None
            try:
                if model is not None:
                    turn.prefix.repeats, turn.prefix.device = repeats, model.device
                turn.prefix.start([layer.memory for layer in layers], turn.prompt.columns)
                for index, layer in enumerate(layers):
                    layer.expect(turn.prefix, index)
                if self.layers.states and model is not None:
                    self._start_states(turn.prefix, model, repeats)
            except BaseException:
                turn.prefix.close()
                raise
        turn.is_strict = self._is_strict
        self._turn, self._marks = turn, None
        self.layers.begin_counting(turn.prefix.columns if turn.prefix is not None else 0)
        if self.layers.offload is not None:
            self.layers.offload.begin_turn(turn.prompt.columns if turn.prompt is not None else 0, self._longest_answer)
        self.last_turn = turn.report()
        return self.last_turn

    def _start_states(self, prefix: PrefixLoad, model: PreTrainedModel, repeats: int) -> None:
        if not prefix.has_states:
            self._checkpoints.go_on(self.layers.states, repeats)
            return
        try:
            self._checkpoints.put(self.layers.states, prefix.states(), model.device, repeats)
        except UnreadableError as error:
            raise prefix.reject(f"the states of a snapshot cannot be used: {error}") from error

    def begin_without_reuse(self, reason: str) -> None:
        """Begin a turn with empty layers that neither reuses nor is kept."""
        self.check_open()
        self.abort()
        self._is_strict = False
        self._start(Turn.off(reason))

    @property
    def has_turn(self) -> bool:
        """Whether a turn has begun that is not committed."""
        return self._turn is not None

    def pass_over(self, reason: str) -> None:
        """Hold nothing, and report a turn that could neither reuse nor be kept."""
        self.start_over()
        self.last_turn = Turn.off(reason).report()

    @property
    def turn(self) -> Turn | None:
        """The turn that has begun and is not committed."""
        return self._turn

    @property
    def has_states(self) -> bool:
        """Whether any layer keeps what is only valid after one token."""
        return bool(self.layers.states)

    @property
    def trace(self) -> TokenTrace | None:
        """What of this turn was seen to be fed; None where nobody needs to watch."""
        return self._turn.trace if self._turn is not None else None

    def prefill_chunks(self) -> Sequence[tuple[int, int]]:
        """Return columns ``(begin, end)`` of the prompt that are to be fed one after the other before the rest."""
        return self._turn.pieces if self._turn is not None else ()

    def prefilled(self, column: int) -> None:
        """Note that forward passes have ended that gave the model the first ``column`` columns, and no more."""
        turn = self._turn
        if turn is None or turn.prompt is None or not self.layers.states:
            return
        if (column == turn.prompt.columns or column in turn.snapshot_columns) and self.layers.in_step(
            turn.passes, ended=True
        ):
            self._checkpoints.take(self.layers.states, column, len(turn.prompt.rows))

    def can_start_again(self) -> bool:
        """Whether the turn began with a known prefix and no forward pass has ended yet: all tokens are known."""
        return any(not layer.complete for layer in self.layers.attention)

    def kept_row(self, row: int) -> tuple[str, TokenIds]:
        """Return the root and the tokens of a row that the last turn kept.

        Raises:
            PromptError: it kept nothing, or has no such row.
        """
        if self._resident is None or self._root is None or not 0 <= row < len(self._resident.rows):
            reason = self.last_turn.miss_reason if self.last_turn is not None else "there was none"
            raise PromptError(f"row {row} of the last turn cannot be named: nothing of it was kept ({reason})")
        return self._root, self._resident.rows[row]

    def commit(self, sequences: Any, eos_ids: Iterable[int] = (), *, whole: bool = True) -> TurnReport:
        """End the turn: keep prompt and generated tokens.

        Whatever goes wrong, the answer is there: nothing is raised, and nothing is kept then.

        Args:
            sequences: what ``generate`` returned; None keeps the prompt alone.
            eos_ids: ids that end a sequence.
            whole: whether no forward pass was interrupted.
        """
        turn, self._turn = self._turn, None
        if turn is None:  # the cache was closed inside generate(), whose answer is right all the same
            self.last_turn = Turn.off("the cache was closed before the turn ended").report()
            return self.last_turn
        generated: list[TokenIds] = []
        try:
            if sequences is not None and not turn.reads(sequences):
                turn.reason = "generate() returned no ids [rows, columns] that go on from the prompt: they are not kept"
                turn.custom, sequences = True, None  # what was fed may have been seen; nothing else can tell
            if sequences is not None:
                generated = turn.generated(sequences, eos_ids)
            named = turn.named(generated, self.layers.row_count, self.layers.common_columns, list(eos_ids))
            ended = whole and is_serving(self)  # in a loop of one's own, the last pass may have been interrupted
            if (
                self.layers.states
                and (whole or not is_serving(self))
                and not self.layers.in_step(turn.passes, ended=ended)
            ):
                turn.reason = "a forward pass of this turn did not reach all layers, and the next ones saw what it left"
                self.lay_out(self.layers.config)
            elif self.layers.has_grown:
                turn.reason = "the model appends layers to a cache that its config does not tell of"
            elif named is not None and turn.identity is not None:
                self._keep(named, turn, whole)
        except Exception as error:
            # The answer is there: it must not be lost because it cannot be kept.
            _log.warning("this turn is not kept: %s: %s", type(error).__name__, error, exc_info=error)
            self.lay_out(self.layers.config)
        finally:
            if turn.prefix is not None:
                turn.prefix.close()
        report = turn.report(generated)
        self.last_turn = self.layers.offload.account(report) if self.layers.offload is not None else report
        return self.last_turn

    def _keep(self, named: ResidentPrefix, turn: Turn, whole: bool) -> None:
        """Keep the tokens whose K and V every buffer holds; ``whole``: no forward pass was interrupted."""
        layers = self.layers.filled
        if not all(layer.complete and layer.rows == len(named.rows) for layer in layers):
            self.lay_out(self.layers.config)
            return
        length = self.layers.common_columns
        for layer in layers:  # an interrupt may have left some layers a step ahead
            layer.length = length
        resident = named.cut(length)
        states = self._states_of(resident, turn, length, whole) if self.layers.states else None
        try:
            self._store_rows(resident, turn, states)
        except StreamError as error:
            _log.warning("this turn is not kept: %s", error)
            self.lay_out(self.layers.config)
            return
        except (ClosedError, MemoryError, torch.OutOfMemoryError) as error:
            # The answer is there: it must not be lost because it cannot be kept.
            _log.warning("this turn is not kept in the store: %s", error)
        self._resident = replace(resident, live=self._checkpoints.live)
        self._marks = LayerMarks(self.layers.layers)

    def _store_rows(
        self, resident: ResidentPrefix, turn: Turn, states: Sequence[Mapping[int, torch.Tensor]] | None
    ) -> None:
        assert turn.identity is not None
        root, manifest = turn.identity.root, turn.identity.manifest
        memories = [layer.memory for layer in self.layers.attention]
        if any(memory is not None and memory.spec.v_dtype is not None for memory in memories):
            _log.warning("this turn is not kept in the store: K and V of a layer have different dtypes")
            return
        for row, (tokens, pad) in enumerate(zip(resident.rows, resident.pads, strict=True)):
            read = partial(host_pages, memories, row, pad)
            self.store.commit(root, tokens, read, manifest, None if states is None else states[row])

    def _states_of(
        self, resident: ResidentPrefix, turn: Turn, length: int, whole: bool
    ) -> list[dict[int, torch.Tensor]]:
        """Return, of each row, the states that are known, by the number of tokens after which they are valid.

        No row is padded: such turns were not begun.
        """
        by_row = []
        live = whole
        for row, prompt_row in enumerate(turn.prompt_rows(len(resident.rows))):
            states = self._checkpoints.of(prompt_row)
            at_end = whole and len(resident.rows[row]) == length
            if at_end and turn.keeps_answer_states and length not in states:
                last = self._checkpoints.take_last(self.layers.states, row)
                if last is not None:
                    states[length] = last
            live = live and at_end and length in states
            by_row.append({column: blob for column, blob in states.items() if column <= length})
        self._checkpoints.lose()
        self._checkpoints.live = length if live else None
        return by_row

    def abort(self) -> None:
        """End a turn that was interrupted: keep the part of its prompt that every layer has."""
        turn = self._turn
        if turn is None:
            return
        attention = self.layers.attention
        # In a first pass that was interrupted, a buffer that is still to be filled looks like one that never is.
        begun = all(layer.complete and layer.length and layer.memory is not None for layer in attention)
        if turn.prompt is not None and begun and (attention or self._checkpoints.taken):
            turn.prompt_only = True
            self.commit(None, whole=False)
        else:
            self.start_over()

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None and turn.prefix is not None:
            turn.prefix.close()

    def copy_to(self, twin: TurnManager, memo: dict[int, Any]) -> None:
        """Let ``twin``, the manager of a second cache, hold the same, and go on with the same turn."""
        turn, offload = self._turn, twin.layers.offload
        if turn is not None and turn.prefix is not None and self.layers.offload is None:
            turn.prefix.wait()  # what is on its way lands in buffers that are about to be shared
        if offload is not None and turn is not None and turn.prompt is not None:
            offload.begin_turn(turn.prompt.columns, self._longest_answer)
        self.layers.copy_to(twin.layers, memo)
        if turn is not None:
            twin._turn = turn.twin(memo if self.can_start_again() else None)
        if self._resident is not None and self._marks is not None and self._marks.still_hold(self.layers.layers):
            twin._resident, twin._marks = self._resident, LayerMarks(twin.layers.layers)
        twin._root, twin.last_turn, twin._checkpoints = self._root, self.last_turn, self._checkpoints.copy()

    def close(self) -> None:
        """Forget the turn, and let go of the buffers."""
        self._end_turn()
        self.layers.let_go()
        self._resident, self.closed = None, True

    def check_open(self) -> None:
        """Make sure that the cache is open.

        Raises:
            ClosedError: it was closed.
        """
        if self.closed:
            raise ClosedError("this TieredCache was closed; make a new one")


def turns_of(value: Any) -> TurnManager | None:
    """Return what manages the turns of a cache, or of the decoder's cache inside of it; None for anything else."""
    cache = decoder_cache(value)
    turns = getattr(cache, "turns", None) if isinstance(cache, DynamicCache) else None
    return turns if isinstance(turns, TurnManager) else None


def managed_among(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments, whatever their names, that are caches with a ``TurnManager``, bare or wrapped."""
    return {name: value for name, value in arguments.items() if turns_of(value) is not None}
