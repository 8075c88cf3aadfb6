"""A cache that takes turns: begins with what is known, keeps what is new. TieredCache is this and its resources."""

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
from transformers import PreTrainedConfig, PreTrainedModel

from kvtier.errors import BlockError, ClosedError, StreamError, UnannouncedError
from kvtier.hf.compat.canary import why_untrusted
from kvtier.hf.compat.model_profiles import profile_of, why_not_so, why_off
from kvtier.hf.identity.fingerprint import identify
from kvtier.hf.inputs.prompt import Prompt
from kvtier.hf.inputs.request import GenerateRequest, media_error
from kvtier.hf.layers.attention import AttentionLayer, SlidingWindowLayer
from kvtier.hf.layers.container import LayerCache, OpenOffload, host_pages
from kvtier.hf.layers.layer_marks import LayerMarks
from kvtier.hf.layers.offloaded_load import OffloadedPrefixLoad
from kvtier.hf.layers.prefix_load import PrefixLoad
from kvtier.hf.layers.state_checkpoints import StateCheckpoints
from kvtier.hf.layers.states import UnreadableError
from kvtier.hf.not_reusable import NotReusable
from kvtier.hf.turn.exclusive_use import check_wrapped, checked_wait_seconds, exclusively, is_serving, running_generate
from kvtier.hf.turn.plan import MakePrefix, plan_turn
from kvtier.hf.turn.prefill_plan import plan_pieces
from kvtier.hf.turn.taker import TurnTaker
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


class TurnCache(LayerCache, TurnTaker):
    """The half of ``TieredCache`` that the hook around ``generate()`` speaks to.

    Args:
        store: where prefixes are kept.
        open_streams: opens what its layers live on.
        wait_seconds: how long a call waits for one that is using the cache on another thread.

    Raises:
        ConfigurationError: ``wait_seconds`` is no number of seconds.
    """

    last_turn: TurnReport | None

    def __init__(self, store: PrefixStore, open_offload: OpenOffload, wait_seconds: float = 0.0) -> None:
        super().__init__(open_offload)
        self._store = store
        self._wait_seconds = checked_wait_seconds(wait_seconds)
        self._closed = False
        self._turn: Turn | None = None
        self._resident: ResidentPrefix | None = None
        self._checkpoints = StateCheckpoints()
        self._root: str | None = None
        self._marks: LayerMarks | None = None
        self._is_strict = False
        self._unseen_generate: FrameType | None = None  # the call itself: a number could be given to a later one
        self._longest_answer = 0
        self.last_turn = None

    @property
    def wait_seconds(self) -> float:
        """How long ``generate``, ``begin``, ``commit`` and ``reset`` wait for a call on another thread."""
        return self._wait_seconds

    # --- layers -----------------------------------------------------------------------------------------------------

    def _lay_out(self, config: PreTrainedConfig | None) -> None:
        super()._lay_out(config if why_untrusted() is None else None)  # there, layers might not even be made
        self._resident = None
        self._checkpoints.lose()

    # Stays outside of what is compiled: it waits for pages, and its buffers outlive the pass.
    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[batch, heads, new tokens, dim]`` to a layer; return the K and V that attention must see.

        Raises:
            BudgetError: ``device_budget`` is too small for so many tokens.
            BusyError: something else than the running ``generate()`` has changed the layer.
            ClosedError: the cache was closed.
            StreamError: a page of a cold layer is lost, or cannot be written.
            UnannouncedError: no turn has begun, and a ``generate()`` is running that kvtier did not see.
            UninstalledError: ``uninstall()`` was called, and no turn has begun.
        """
        layers = self.layers
        layer = layers[layer_idx] if layer_idx < len(layers) else self._layer(layer_idx)
        turn = self._turn
        if turn is None:
            self._feed_unannounced()
        else:
            turn.appending(layer_idx, layer.get_seq_length(), key_states.shape[2])
        states: tuple[torch.Tensor, torch.Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        return states

    # Models without attention come here alone.
    def _feeding_states(self) -> None:
        if self._turn is None:
            self._feed_unannounced()

    def _feed_unannounced(self) -> None:
        """Prepare for tokens that no turn has announced: in a loop of one's own they are fine, in ``generate()`` not.

        A ``generate()`` that kvtier did not see takes what the cache holds for the beginning of its prompt. One that
        finds the cache empty is right, as long as it is the same call.
        """
        self._check_open()
        check_wrapped()
        running = running_generate()
        holds_tokens = self._resident is not None or bool(self.get_seq_length())
        if running is not None and running is not self._unseen_generate and holds_tokens:
            raise UnannouncedError(_UNANNOUNCED)
        self._unseen_generate = running
        self._resident = None  # tokens without a name

    def reset(self) -> None:
        """Hold nothing. The store keeps what it has.

        Raises:
            BusyError: another call is using the cache.
        """
        exclusively(self, "reset()", self.start_over)

    def start_over(self) -> None:
        """Hold nothing, and forget the turn."""
        self._unseen_generate = None
        self._end_turn()
        self._lay_out(self._config)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens."""
        self._checkpoints.live = None
        super().crop(tokens_to_remove)
        if self._turn is not None and tokens_to_remove:
            ends = {index: self.layers[index].get_seq_length() for index in self._turn.ends}
            self._turn.cropped(self.get_seq_length(), ends)

    def _move_rows(self, rows: torch.Tensor, move: Callable[[Any], None]) -> None:
        before, turn = self._row_count, self._turn
        # Until every layer has moved, an interrupt leaves rows that differ between layers: nothing of it can be kept.
        self._turn, self._resident = (Turn.off("rows were being moved") if turn else None), None
        super()._move_rows(rows, move)
        self._turn = turn
        if turn is not None:
            turn.rows_moved(rows, before)

    def _begin(self, model: PreTrainedModel, request: GenerateRequest) -> TurnReport:
        self._check_open()
        self._longest_answer = request.longest_answer
        # These take tokens back, or may do anything. Of calls whose arguments were not read, nothing is known.
        self._is_strict = is_serving(self) and request.ids is not None and request.cold is None and not request.custom
        self._salvage()
        start = partial(self._start_request, request)
        prompt, off = request.prompt, why_untrusted() or request.off
        config = getattr(model, "config", None)
        if not isinstance(config, PreTrainedConfig):
            off = off or "the model has no config"
        elif not self._fits(config):
            self._lay_out(config)
        off = off or self._no_reuse or (why_off(model) if config is not None else None)
        states = bool(self._states)
        if prompt is not None and not off and states and prompt.is_padded:  # then K and V depend on it as well
            off = "padding would go into the states of this model"
        if prompt is not None and not off:
            off = why_not_so(model, prompt.columns, prompt.is_padded, request.longest_answer)
        if prompt is None or off or prompt.columns == 0 or not prompt.rows:
            return start(Turn.off(off or "the prompt is empty"))
        started = time.perf_counter()
        tokens = np.unique(np.concatenate(prompt.rows))
        identity = identify(model, self._store.namespace, self._store.block_size, tokens)
        if isinstance(identity, NotReusable):
            return start(Turn.off(identity.reason))
        changed = self._root is not None and identity.root != self._root
        if changed:
            self._lay_out(self._config)
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
            turn = plan_turn(
                prompt, identity, self._resident_now(), self._store, self._prefix_for(model), states=states
            )
            turn.match_seconds = time.perf_counter() - started
            if turn.prefix is None:
                if not any(turn.known):
                    turn.reason = "nothing known begins so"
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
        self._check_open()
        self._salvage()
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
        if self._offload is None:
            return PrefixLoad
        return partial(OffloadedPrefixLoad, self._offload, None if self._is_spread(model) else model.device)

    def _hides_rows(self, prompt: Prompt) -> bool:
        """Whether the last column of a row sees none of its tokens: what comes then depends on how it was fed."""
        trailing = max(prompt.columns - pad - len(row) for row, pad in zip(prompt.rows, prompt.pads, strict=True))
        if trailing <= 0:
            return False
        text = self._config.get_text_config(decoder=True) if self._config is not None else None
        widths = [layer.sliding_window for layer in self._attention_layers if isinstance(layer, SlidingWindowLayer)]
        return bool(widths) and (trailing >= min(widths) or bool(getattr(text, "attention_chunk_size", None)))

    def _resident_now(self) -> ResidentPrefix | None:
        """Return what all buffers hold, cut to their length: a crop between turns shortens it.

        None where anything else has changed a layer since, by whatever way.
        """
        if self._resident is None or not self.layers or self._marks is None or not self._marks.still_hold(self.layers):
            return None
        if not self._attention_layers:
            return self._resident
        lengths = {layer.length for layer in self._filled}
        if len(lengths) != 1 or not all(layer.complete for layer in self._filled):
            return None
        return self._resident.cut(lengths.pop())

    @property
    def _filled(self) -> list[AttentionLayer]:
        return [layer for layer in self._attention_layers if layer.is_used or not layer.is_optional]

    def _start(self, turn: Turn, model: PreTrainedModel | None = None, repeats: int = 1) -> TurnReport:
        self._resident = self._unseen_generate = None  # first of all: from here on, pages may land in the buffers
        if turn.prefix is None:
            self._lay_out(self._config)
        else:
            layers = self._attention_layers
            assert turn.prompt is not None
            try:
                if model is not None:
                    turn.prefix.repeats, turn.prefix.device = repeats, model.device
                turn.prefix.start([layer.memory for layer in layers], turn.prompt.columns)
                for index, layer in enumerate(layers):
                    layer.expect(turn.prefix, index)
                if self._states and model is not None:
                    self._start_states(turn.prefix, model, repeats)
            except BaseException:
                turn.prefix.close()
                raise
        turn.is_strict = self._is_strict
        self._turn, self._marks = turn, None
        self._calls.clear()
        self._fed_columns = turn.prefix.columns if turn.prefix is not None else 0
        if self._offload is not None:
            self._offload.begin_turn(turn.prompt.columns if turn.prompt is not None else 0, self._longest_answer)
        self.last_turn = turn.report()
        return self.last_turn

    def _start_states(self, prefix: PrefixLoad, model: PreTrainedModel, repeats: int) -> None:
        if not prefix.has_states:
            self._checkpoints.go_on(self._states, repeats)
            return
        try:
            self._checkpoints.put(self._states, prefix.states(), model.device, repeats)
        except UnreadableError as error:
            raise prefix.reject(f"the states of a snapshot cannot be used: {error}") from error

    def begin_without_reuse(self, reason: str) -> None:
        """Begin a turn with empty layers that neither reuses nor is kept."""
        self._check_open()
        self._salvage()
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
    def _has_states(self) -> bool:
        return bool(self._states)

    @property
    def _fed(self) -> TokenTrace | None:
        return self._turn.trace if self._turn is not None else None

    def _common_length(self) -> int:
        """Return the columns that every layer has."""
        return min((layer.length for layer in self._filled), default=self.get_seq_length())

    def _pieces(self) -> Sequence[tuple[int, int]]:
        return self._turn.pieces if self._turn is not None else ()

    def _passed(self, column: int) -> None:
        turn = self._turn
        if turn is None or turn.prompt is None or not self._states:
            return
        if (column == turn.prompt.columns or column in turn.snapshot_columns) and self._in_step(
            turn.passes, ended=True
        ):
            self._checkpoints.take(self._states, column, len(turn.prompt.rows))

    def _commit(self, sequences: Any, eos_ids: Iterable[int], *, whole: bool = True) -> TurnReport:
        turn, self._turn = self._turn, None
        if turn is None:  # the cache was closed inside generate(), whose answer is right all the same
            self.last_turn = Turn.off("the cache was closed before the turn ended").report()
            return self.last_turn
        if "layers" not in vars(self):  # they were deleted inside generate()
            turn = Turn.off("the layers of the cache were deleted")
            self._lay_out(self._config)
        generated: list[TokenIds] = []
        try:
            if sequences is not None and not turn.reads(sequences):
                turn.reason = "generate() returned no ids [rows, columns] that go on from the prompt: they are not kept"
                turn.custom, sequences = True, None  # what was fed may have been seen; nothing else can tell
            if sequences is not None:
                generated = turn.generated(sequences, eos_ids)
            named = turn.named(generated, self._row_count, self._common_length(), list(eos_ids))
            ended = whole and is_serving(self)  # in a loop of one's own, the last pass may have been interrupted
            if self._states and (whole or not is_serving(self)) and not self._in_step(turn.passes, ended=ended):
                turn.reason = "a forward pass of this turn did not reach all layers, and the next ones saw what it left"
                self._lay_out(self._config)
            elif self._has_grown:
                turn.reason = "the model appends layers to a cache that its config does not tell of"
            elif named is not None and turn.identity is not None:
                self._keep(named, turn, whole)
        except Exception as error:
            # The answer is there: it must not be lost because it cannot be kept.
            _log.warning("this turn is not kept: %s: %s", type(error).__name__, error, exc_info=error)
            self._lay_out(self._config)
        finally:
            if turn.prefix is not None:
                turn.prefix.close()
        report = turn.report(generated)
        self.last_turn = self._offload.account(report) if self._offload is not None else report
        return self.last_turn

    def _keep(self, named: ResidentPrefix, turn: Turn, whole: bool) -> None:
        """Keep the tokens whose K and V every buffer holds; ``whole``: no forward pass was interrupted."""
        layers = self._filled
        if not all(layer.complete and layer.rows == len(named.rows) for layer in layers):
            self._lay_out(self._config)
            return
        length = self._common_length()
        for layer in layers:  # an interrupt may have left some layers a step ahead
            layer.length = length
        resident = named.cut(length)
        states = self._states_of(resident, turn, length, whole) if self._states else None
        try:
            self._store_rows(resident, turn, states)
        except StreamError as error:
            _log.warning("this turn is not kept: %s", error)
            self._lay_out(self._config)
            return
        except (ClosedError, MemoryError, torch.OutOfMemoryError) as error:
            # The answer is there: it must not be lost because it cannot be kept.
            _log.warning("this turn is not kept in the store: %s", error)
        self._resident = replace(resident, live=self._checkpoints.live)
        self._marks = LayerMarks(self.layers)

    def _store_rows(
        self, resident: ResidentPrefix, turn: Turn, states: Sequence[Mapping[int, torch.Tensor]] | None
    ) -> None:
        assert turn.identity is not None
        root, manifest = turn.identity.root, turn.identity.manifest
        memories = [layer.memory for layer in self._attention_layers]
        if any(memory is not None and memory.spec.v_dtype is not None for memory in memories):
            _log.warning("this turn is not kept in the store: K and V of a layer have different dtypes")
            return
        for row, (tokens, pad) in enumerate(zip(resident.rows, resident.pads, strict=True)):
            read = partial(host_pages, memories, row, pad)
            self._store.commit(root, tokens, read, manifest, None if states is None else states[row])

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
                last = self._checkpoints.take_last(self._states, row)
                if last is not None:
                    states[length] = last
            live = live and at_end and length in states
            by_row.append({column: blob for column, blob in states.items() if column <= length})
        self._checkpoints.lose()
        self._checkpoints.live = length if live else None
        return by_row

    def _salvage(self) -> None:
        turn = self._turn
        if turn is None:
            return
        if "layers" not in vars(self):
            self.start_over()
            return
        # In a first pass that was interrupted, a buffer that is still to be filled looks like one that never is.
        begun = all(layer.complete and layer.length and layer.memory is not None for layer in self._attention_layers)
        if turn.prompt is not None and begun and (self._attention_layers or self._checkpoints.taken):
            turn.prompt_only = True
            self._commit(None, (), whole=False)
        else:
            self.start_over()

    def _can_start_again(self) -> bool:
        return any(not layer.complete for layer in self._attention_layers)

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None and turn.prefix is not None:
            turn.prefix.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this TieredCache was closed; make a new one")
