"""TurnManager: begins, tracks and commits the turns of one cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from kvtier.costs.book import CostBook
from kvtier.errors import BlockError, ClosedError, PromptError, UnannouncedError
from kvtier.hf.compat.canary import why_untrusted
from kvtier.hf.compat.names import decoder_cache
from kvtier.hf.identity.fingerprint import Identity, identify
from kvtier.hf.identity.trusted_hooks import NO_HOOKS, TrustedHooks
from kvtier.hf.inputs.continued import media_error
from kvtier.hf.inputs.prompt import Prompt, ResidentPrefix
from kvtier.hf.inputs.request import GenerateRequest
from kvtier.hf.inputs.vocabulary import vocabulary_of
from kvtier.hf.layers.container import LayerContainer
from kvtier.hf.layers.state_checkpoints import StateCheckpoints
from kvtier.hf.not_reusable import NotReusable, warn_of
from kvtier.hf.turn.candidates import HeldPrefix
from kvtier.hf.turn.choice.clock import TurnClock, is_asynchronous, wait_for_compute
from kvtier.hf.turn.choice.estimates import machine_name
from kvtier.hf.turn.cost import COSTS
from kvtier.hf.turn.exclusive_use import check_wrapped, checked_wait_seconds, is_serving, running_generate
from kvtier.hf.turn.keep import keep, note_costs
from kvtier.hf.turn.reporting.turn_progress import progress_of_turn
from kvtier.hf.turn.start import admit, dropped_columns, planned_turn, start_load, why_cold
from kvtier.hf.turn.token_trace import TokenTrace
from kvtier.hf.turn.turn import Turn
from kvtier.progress import Progress
from kvtier.report import TurnLog, TurnReport
from kvtier.store import PrefixStore
from kvtier.store.chain import TokenIds

_log = logging.getLogger("kvtier.hf")

_UNANNOUNCED = (
    "a generate() that kvtier did not see feeds this TieredCache, which holds {tokens} tokens of an earlier call: they "
    "may not be the start of its prompt. Call model.generate(…), taken from the model after kvtier was imported; in a "
    "loop of your own, cache.begin(model, input_ids) before the model and cache.commit(sequences) after it; or "
    "cache.reset() before the call, to begin with an empty cache. If none of these helps, kvtier does not know this "
    "version of transformers"
)


class TurnManager:
    """The turns of one cache: their start, changes of the layers meanwhile, and their commit.

    Guarantees: a turn begins with a prefix of its own prompt, or with nothing. However a turn ends, the layers then
    hold known tokens, or nothing.

    Attributes:
        layers: layers of the cache.
        store: store of the prefixes.
        wait_seconds: how long a call waits for a call on another thread that is using the cache.
        costs: constants of plans.
        weighs: whether a known prefix is loaded only where that is expected to be faster than to compute it.
        trusted_hooks: hooks on models that leave K and V as they are.
        progress: is told how far prompts, loads and commits are; None when nothing is.
        turn: the turn that has begun and is not committed.
        last_turn: the report of the last turn that has begun; None before the first.
        log: the reports of turns that have ended, and their totals; those of forks have logs of their own.
        closed: whether the cache was closed.
        tokenizer: shows stored prefixes as text; None if it is not known.

    Raises:
        ConfigurationError: ``wait_seconds`` is not a valid number of seconds.
    """

    def __init__(
        self,
        layers: LayerContainer,
        store: PrefixStore,
        wait_seconds: float,
        lossy_page_codec: str | None,
        *,
        weighs: bool = False,
        trusted_hooks: TrustedHooks = NO_HOOKS,
        progress: Progress | None = None,
    ) -> None:
        self.layers = layers
        self.store = store
        self._lossy_page_codec = lossy_page_codec
        self.costs = COSTS
        self.weighs = weighs
        self.trusted_hooks = trusted_hooks
        self.progress = progress
        self.wait_seconds = checked_wait_seconds(wait_seconds)
        self.last_turn: TurnReport | None = None
        self.log = TurnLog()
        self.closed = False
        self.tokenizer: Any = None
        self.turn: Turn | None = None
        self._resident: HeldPrefix | None = None
        self._checkpoints = StateCheckpoints()
        self._root: str | None = None
        self._book: CostBook | None = None
        self._began = 0.0
        self._is_strict = self._is_asynchronous = False
        self._unseen_generate: FrameType | None = None  # the frame itself: a later call could get the same id
        self._new_columns = 0

    # --- layers -----------------------------------------------------------------------------------------------------

    def lay_out(self, config: PreTrainedConfig | None) -> None:
        """Drop all content and make empty layers for a model."""
        self.layers.lay_out(config if why_untrusted() is None else None)  # else making layers might fail
        self._resident = None
        self._checkpoints.lose()

    def appending(self, index: int, layer: Any, columns: int) -> None:
        """Note that ``columns`` columns are about to be appended to a layer.

        Raises:
            BusyError: something other than the running ``generate()`` has changed the layer.
            ClosedError: the cache was closed.
            UnannouncedError: no turn has begun, kvtier did not see the running ``generate()``, the cache holds tokens.
            UninstalledError: ``uninstall()`` was called, and no turn has begun.
        """
        turn = self.turn
        if turn is None:
            self._feed_unannounced()
        else:
            turn.appending(index, layer.get_seq_length(), columns)

    def changing_states(self) -> None:
        """Note that a model is about to change states: models without attention are noticed only here.

        Raises:
            ClosedError: the cache was closed.
            UnannouncedError: no turn has begun, kvtier did not see the running ``generate()``, the cache holds tokens.
            UninstalledError: ``uninstall()`` was called, and no turn has begun.
        """
        if self.turn is None:
            self._feed_unannounced()

    def _feed_unannounced(self) -> None:
        """Prepare for tokens outside a turn: a custom loop may feed them, ``generate()`` only into an empty cache.

        A ``generate()`` that kvtier did not see takes the tokens in the cache for the start of its prompt. A call that
        began with an empty cache may go on, as long as it is the same call.
        """
        self.check_open()
        check_wrapped()
        running = running_generate()
        holds_tokens = self._resident is not None or bool(self.layers.columns)
        if running is not None and running is not self._unseen_generate and holds_tokens:
            raise UnannouncedError(_UNANNOUNCED.format(tokens=self.layers.columns))
        self._unseen_generate = running
        self._resident = None  # the ids of the new tokens are not known
        self.layers.before_writing()

    def start_over(self) -> None:
        """Drop all content and the turn."""
        self._unseen_generate = None
        self._end_turn()
        self.lay_out(self.layers.config)

    def cropping(self) -> None:
        """Note that every layer is about to be cropped."""
        self._checkpoints.live = None

    def cropped(self) -> None:
        """Note that every layer was cropped."""
        if self.turn is not None:
            ends = {index: self.layers.layers[index].get_seq_length() for index in self.turn.ends}
            self.turn.cropped(self.layers.columns, ends)

    def move_rows(self, rows: torch.Tensor, move: Callable[[Any], None]) -> None:
        """Replace row ``i`` of every layer by former row ``rows[i]``; ``move`` does so in one layer with K and V."""
        before, turn = self.layers.row_count, self.turn
        # Until every layer has moved, an interrupt leaves different rows in different layers: nothing can be kept then.
        self.turn, self._resident = (Turn.off("rows were being moved") if turn else None), None
        self.layers.before_writing()
        self.layers.move_rows(rows, move)
        self.turn = turn
        if turn is not None:
            turn.rows_moved(rows, before)
            if self.layers.dropped is not None:
                self.layers.dropped.rows_moved()

    # --- a turn -----------------------------------------------------------------------------------------------------

    def begin(self, model: PreTrainedModel, request: GenerateRequest) -> TurnReport:
        """Begin a turn of ``model``; its pages may still be loading afterwards.

        Raises:
            ClosedError: the cache was closed.
            PromptError: media of the prompt were not passed, and the reused prefix does not contain them.
        """
        self.check_open()
        self._began = time.perf_counter()
        self._new_columns = request.new_columns
        # Cold and custom calls may crop or change the cache otherwise; nothing is known of calls with unread arguments.
        self._is_strict = is_serving(self) and request.ids is not None and request.cold is None and not request.custom
        self.abort()
        self._lay_out_for(model)
        prompt = admit(model, request, self.layers)
        if isinstance(prompt, NotReusable):
            return self._start_without_reuse(request, prompt)
        identity = self._identify(model, np.concatenate(prompt.rows))
        if isinstance(identity, NotReusable):
            return self._start_without_reuse(request, identity)
        changed = self._root is not None and identity.root != self._root
        if changed:
            self.lay_out(self.layers.config)
        self._root = identity.root
        self._book = self.store.costs(identity.root, machine_name(model.device))
        self._is_asynchronous = is_asynchronous(model.device)
        cold = why_cold(prompt, request, self.layers)
        if cold is not None:
            return self._start(request, self._cold_turn(prompt, identity, request, cold))
        book = self._book if self.weighs else None
        while True:
            turn = planned_turn(
                model, prompt, identity, request, self._resident_now(), self.layers, self.store, self.costs, book
            )
            turn.match_seconds = time.perf_counter() - self._began
            if changed and turn.prefix is None:
                turn.reason = "the model is not the one that filled this cache"
            try:
                return self._start(request, turn)
            except BlockError:
                continue  # the blocks do not fit the model and are withheld: plan without them

    def _lay_out_for(self, model: PreTrainedModel) -> None:
        config = getattr(model, "config", None)
        if isinstance(config, PreTrainedConfig) and not self.layers.fits(config):
            self.lay_out(config)

    def _identify(self, model: PreTrainedModel, tokens: TokenIds) -> Identity | NotReusable:
        store, has_windows = self.store, self.layers.window is not None
        codecs = store.lossy_codec, self._lossy_page_codec
        return identify(
            model,
            store.namespace,
            store.block_size,
            tokens,
            *codecs,
            has_windows=has_windows,
            trusted_hooks=self.trusted_hooks,
        )

    def identity_of(self, model: PreTrainedModel) -> Identity | NotReusable:
        """Return the identity under which a turn of ``model`` would be kept now, or why none would be.

        Between turns: a cache that was laid out for another model drops its content.

        Raises:
            ClosedError: the cache was closed.
        """
        self.check_open()
        self.abort()
        self._lay_out_for(model)
        return self._identify(model, np.empty(0, np.int64))

    def _cold_turn(self, prompt: Prompt, identity: Identity, request: GenerateRequest, reason: str) -> Turn:
        if self.layers.states:
            return Turn.off(reason)  # rejected draft tokens would still be in the states
        trace = TokenTrace(prompt) if request.watched and prompt.plain else None
        return Turn(prompt, identity, None, reason, prompt_only=True, trace=trace, custom=request.custom)

    def resident(self) -> ResidentPrefix | None:
        """Return the tokens of the last turn whose K and V the cache holds; None when there are none.

        Raises:
            ClosedError: the cache was closed.
        """
        self.check_open()
        self.abort()
        return self._resident_now()

    def _resident_now(self) -> ResidentPrefix | None:
        return self._resident.now(self.layers) if self._resident is not None else None

    def _start(self, request: GenerateRequest, turn: Turn) -> TurnReport:
        """Start the ``turn`` of a ``request``.

        Raises:
            BlockError: blocks do not fit the model; later lookups skip them.
            PromptError: media of the call's prompt were not passed, and the reused prefix does not contain them.
        """
        needed = request.prompt.needed if request.prompt is not None else 0
        if needed > turn.reused_columns:
            reason = turn.reason or "the turn would begin before the last of it entered"
            turn.let_go()
            if request.inputs is not None:
                raise media_error(request.missing, reason)
            turn = Turn.off(f"the cache holds media that the loop would have to feed again: {reason}")
        columns = turn.prompt.columns if turn.prompt is not None else 0
        if turn.prompt is not None:
            rows = len(turn.prompt.rows) * request.repeats
            turn.clock = TurnClock(self._began, columns, rows, is_asynchronous=self._is_asynchronous)
            if self.progress is not None:
                layers = len(self.layers.layers)
                turn.progress = progress_of_turn(turn, self.progress, layers, by_layer=not self._is_asynchronous)
        if turn.meeting is not None:
            turn.meet_at_once()
        self._resident = self._unseen_generate = None  # first: from here on, pages may land in the buffers
        self.layers.before_writing()
        self.layers.expect_columns(columns, self._new_columns)
        if turn.prefix is None:
            self.lay_out(self.layers.config)
        else:
            try:
                start_load(turn.prefix, columns, self.layers, self._checkpoints)
            except BaseException:
                turn.let_go()
                self.lay_out(self.layers.config)  # rows may have been moved in some of the layers
                raise
        self.layers.keep_dropped(dropped_columns(turn, self.layers, self.costs))
        turn.is_strict = self._is_strict
        self.turn = turn
        self.layers.begin_counting(turn.reused_columns)
        self.last_turn = turn.report()
        return self.last_turn

    def _start_without_reuse(self, request: GenerateRequest, why: NotReusable) -> TurnReport:
        if why.lasts:
            warn_of(why.reason)
        return self._start(request, Turn.off(why.reason))

    def begin_without_reuse(self, reason: str) -> None:
        """Begin a turn with empty layers that neither reuses nor is kept."""
        self.check_open()
        self.abort()
        self._is_strict = False
        self._start(GenerateRequest(reason), Turn.off(reason))

    def pass_over(self, reason: str) -> None:
        """Drop all content, and report a turn of a model that can neither reuse nor be kept."""
        self.start_over()
        self._ended(Turn.off(reason).report())
        warn_of(reason)

    @property
    def trace(self) -> TokenTrace | None:
        """The trace of this turn; None when generated tokens are known without it."""
        return self.turn.trace if self.turn is not None else None

    def prefill_chunks(self) -> Sequence[tuple[int, int]]:
        """Return the columns ``(begin, end)`` of each chunk to be fed, in order, before the rest of the prompt."""
        return self.turn.prefill.chunks if self.turn is not None else ()

    def next_chunk(self) -> tuple[int, int] | None:
        """Return the columns ``(begin, end)`` to feed next, while the end of the prefix loads; None when it is there.

        Raises:
            BlockError: the blocks do not fit the layers; later lookups skip them.
        """
        turn = self.turn
        if turn is None or turn.meeting is None or turn.meeting.joined is not None:
            return None
        column = self.layers.columns
        if column > turn.meeting.begin and turn.clock is not None:
            # What has arrived meanwhile decides: a chunk that is only enqueued has left no time for it.
            wait_for_compute({layer.memory.device for layer in self.layers.attention if layer.memory is not None})
            turn.clock.end_pass(turn.waited_seconds, is_settled=True)
        end = turn.meeting.next_chunk(column)
        if turn.progress is not None:
            turn.progress.arrived(turn.meeting.arrived_share)
        if end is not None:
            return column, end
        prefix = turn.join(column)
        if prefix is not None:
            assert turn.prompt is not None
            start_load(prefix, turn.prompt.columns, self.layers, self._checkpoints)
        self.last_turn = turn.report()
        return None

    def prefilled(self, column: int) -> None:
        """Note that completed forward passes have fed the model exactly the first ``column`` columns."""
        turn = self.turn
        if turn is None or turn.prompt is None or not self.layers.states:
            return
        if turn.progress is not None:
            turn.progress.reached(column)
        is_kept = column == turn.prompt.columns or column in turn.prefill.checkpoint_columns
        if is_kept and self.layers.in_step(turn.passes, ended=True):
            self._checkpoints.take(self.layers.states, column, len(turn.prompt.rows))

    def can_start_again(self) -> bool:
        """Whether the turn can restart: it began with a known prefix, and no forward pass has ended yet."""
        return any(not layer.complete for layer in self.layers.attention)

    def kept_row(self, row: int) -> tuple[str, TokenIds]:
        """Return the root and the tokens of a row that the last turn kept.

        Raises:
            PromptError: the last turn kept nothing, or has no such row.
        """
        if self._resident is None or self._root is None or not 0 <= row < len(self._resident.prefix.rows):
            reason = self.last_turn.miss_reason if self.last_turn is not None else "there was none"
            raise PromptError(f"row {row} of the last turn cannot be named: nothing of it was kept ({reason})")
        return self._root, self._resident.prefix.rows[row]

    def commit(self, sequences: Any, eos_ids: Iterable[int] = (), *, whole: bool = True) -> TurnReport:
        """End the turn: keep prompt and generated tokens.

        An error is logged and not raised, because the answer exists already. The turn is not kept then.

        Args:
            sequences: the return value of ``generate``; None keeps only the prompt.
            eos_ids: ids that end a sequence.
            whole: whether no forward pass was interrupted.
        """
        turn, self.turn = self.turn, None
        if turn is None:  # the cache was closed inside generate(); the answer is still right
            return self._ended(Turn.off("the cache was closed before the turn ended").report())
        if turn.progress is not None:
            turn.progress.end(whole=whole)
        generated: list[TokenIds] = []
        lasting: str | None = None
        try:
            if sequences is not None and not turn.reads(sequences):
                turn.reason = "generate() returned no ids [rows, columns] that go on from the prompt: they are not kept"
                turn.custom, sequences = True, None  # only a trace can still show the tokens fed
            if sequences is not None:
                generated = turn.generated(sequences, eos_ids)
                self._note_costs(turn)
            named = turn.named(generated, self.layers.row_count, self.layers.common_columns, list(eos_ids))
            serving = is_serving(self)
            ended = whole and serving  # in a custom loop, the last pass may have been interrupted
            if self.layers.states and (whole or not serving) and not self.layers.in_step(turn.passes, ended=ended):
                turn.reason = "a forward pass of this turn did not reach all layers, and the next ones saw what it left"
                self.lay_out(self.layers.config)
            elif self.layers.has_grown:
                turn.reason = lasting = "the model appends layers to a cache that its config does not tell of"
            elif named is not None and turn.identity is not None:
                kept = keep(
                    named,
                    turn,
                    self.layers,
                    self._checkpoints,
                    self.store,
                    whole=whole,
                    weighs=self.weighs,
                    progress=self.progress,
                )
                if kept is None:
                    self.lay_out(self.layers.config)
                else:
                    self._resident = HeldPrefix(kept, self.layers)
                    self._keep_vocabulary(turn.identity.root)
        except Exception as error:
            # The answer exists: failing to keep the turn must not lose it.
            _log.warning("this turn is not kept: %s: %s", type(error).__name__, error, exc_info=error)
            self.lay_out(self.layers.config)
        finally:
            self.layers.keep_dropped(None)
            turn.let_go()
        kept_tokens = sum(map(len, self._resident.prefix.rows)) if self._resident is not None else 0
        report = turn.report(generated, kept_tokens)
        report = self._ended(self.layers.offload.account(report) if self.layers.offload is not None else report)
        if lasting is not None:
            warn_of(lasting)
        return report

    def _ended(self, report: TurnReport) -> TurnReport:
        self.last_turn = report
        self.log.add(report)
        return report

    def _note_costs(self, turn: Turn) -> None:
        """Note what the passes and loads of a turn took; in custom loops, a pass may have waited for the caller."""
        if turn.clock is None or self._book is None or turn.identity is None:
            return
        turn.clock.end_pass(turn.waited_seconds)
        if not turn.is_strict:
            return
        token_bytes = sum(layer.memory.spec.token_bytes for layer in self.layers.attention if layer.memory is not None)
        note_costs(self._book, turn, token_bytes)
        lower = self.store.lookup_below()
        if lower is not None and lower[1]:
            self._book.note_lookup(*lower)

    def abort(self) -> None:
        """End an interrupted turn: keep the part of its prompt that every layer has."""
        turn = self.turn
        if turn is None:
            return
        attention = self.layers.attention
        # In an interrupted first pass, a buffer not yet filled looks like an unused buffer.
        begun = all(layer.complete and layer.length and layer.memory is not None for layer in attention)
        if turn.prompt is not None and begun and (attention or self._checkpoints.taken):
            turn.prompt_only = True
            self.commit(None, whole=False)
        else:
            self.start_over()

    def _end_turn(self) -> None:
        turn, self.turn = self.turn, None
        if turn is not None:
            turn.let_go()

    def _keep_vocabulary(self, root: str) -> None:
        """Keep the vocabulary of the tokenizer, if it is known, in the store. A failure costs a line in the log."""
        if self.tokenizer is None or not self.store.lacks_vocabulary(root):
            return
        try:
            self.store.keep_vocabulary(root, vocabulary_of(self.tokenizer))
        except Exception as error:  # the tokenizer may be anybody's
            self.tokenizer = None
            _log.warning("stored prefixes have no text: %s: %s", type(error).__name__, error)

    def copy_to(self, twin: TurnManager, memo: dict[int, Any]) -> None:
        """Copy the content and the running turn to ``twin``, the manager of a second cache."""
        turn = self.turn
        if turn is not None and turn.prefix is not None and self.layers.offload is None:
            turn.prefix.wait()  # loading pages land in buffers that are about to be shared
        if turn is not None and turn.prompt is not None:
            twin.layers.expect_columns(turn.prompt.columns, self._new_columns)
        self.layers.copy_to(twin.layers, memo)
        if turn is not None:
            twin.turn = turn.twin(memo if self.can_start_again() else None)
            if twin.layers.dropped is not None:
                twin.layers.dropped.prompt_rows = twin.turn.prompt_rows
        if self._resident is not None and self._resident.is_in(self.layers):
            twin._resident = HeldPrefix(self._resident.prefix, twin.layers)
        twin._root, twin.last_turn, twin._checkpoints = self._root, self.last_turn, self._checkpoints.copy()
        twin.tokenizer = self.tokenizer
        twin.costs, twin.weighs, twin._book = self.costs, self.weighs, self._book
        twin.trusted_hooks = self.trusted_hooks

    def close(self) -> None:
        """Drop the turn and release the buffers."""
        self._end_turn()
        self.layers.let_go()
        self._resident, self.closed = None, True

    def check_open(self) -> None:
        """Check that the cache is open.

        Raises:
            ClosedError: the cache was closed.
        """
        if self.closed:
            raise ClosedError("this TieredCache was closed; make a new one")


def turns_of(value: Any) -> TurnManager | None:
    """Return the ``TurnManager`` of a cache, or of the decoder's cache inside it; None for any other value."""
    cache = decoder_cache(value)
    turns = getattr(cache, "turns", None) if isinstance(cache, DynamicCache) else None
    return turns if isinstance(turns, TurnManager) else None


def managed_among(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments, under any name, that are caches with a ``TurnManager``, bare or wrapped."""
    return {name: value for name, value in arguments.items() if turns_of(value) is not None}
