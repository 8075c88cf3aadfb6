"""TieredCache: a transformers cache that knows its tokens, and owns the turn."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvtier.errors import BlockError, ClosedError, ConfigurationError, PromptError, StreamError
from kvtier.hf.fed import Fed
from kvtier.hf.generate import TurnTaker, check_installed, install, look_for_own_generate
from kvtier.hf.identity import identify
from kvtier.hf.inputs import why_not_begin
from kvtier.hf.layers import SlidingWindowLayer, WindowLayer
from kvtier.hf.pieces import plan_pieces
from kvtier.hf.plan import MakePrefix, plan_turn
from kvtier.hf.prefix import TurnPrefix
from kvtier.hf.prompt import Prompt, Unreadable, read_prompt
from kvtier.hf.quirks import decodes_otherwise, takes_token_by_token, why_off
from kvtier.hf.snapshots import Snapshots
from kvtier.hf.soundness import Unsound
from kvtier.hf.states import UnreadableError
from kvtier.hf.streamed import StreamedPrefix
from kvtier.hf.streaming import Streaming
from kvtier.hf.turn import Held, Turn
from kvtier.hf.windows import WindowCache, host_pages
from kvtier.report import TurnReport
from kvtier.store import PrefixStore
from kvtier.store.names import NamedPrefix, checked_name, checked_ttl
from kvtier.store.shared import Lease
from kvtier.stream.streams import MakeEngine
from kvtier.transfer import engine_for

_log = logging.getLogger("kvtier.hf")


class TieredCache(WindowCache, TurnTaker):
    """A ``past_key_values`` that never computes a known prefix twice.

    Guarantees: what is reused was computed for the same tokens by the same model, compared id by id; K and V are the
    bytes that were computed; a store that fails costs a recompute. One object serves one ``generate`` at a time.
    Inference only: K and V that require grad are detached.

    Args:
        store: a folder (one store for all caches of the process that name it), a ``PrefixStore``, or None for the
            process-wide store in RAM.
        config: the model's config, to lay out layers before the first turn; otherwise the first turn does it.
        device_budget: bytes for K and V on each device that computes, e.g. ``"6GiB"``, or ``"auto"`` for what is free
            there less a reserve; layers that do not fit are cold. None: all are hot. On a machine without accelerator
            that device is the RAM.
        host_budget: bytes of RAM for pages of cold layers, beyond which they go to disk; by default half of the
            machine's. Without accelerator, cold layers go to disk at once.
        spill_dir: folder for pages of cold layers; by default beside the store's blocks, or in the user's cache folder.
        engine: ``device`` → what moves bytes there; for tests and new kinds of devices.

    Raises:
        ConfigurationError: ``store`` is neither a path nor a ``PrefixStore``, ``config`` no config, a budget no byte
            count, or ``spill_dir`` no path.
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | PrefixStore | None = None,
        *,
        config: PreTrainedConfig | None = None,
        device_budget: int | str | None = None,
        host_budget: int | str | None = None,
        spill_dir: str | os.PathLike[str] | None = None,
        engine: MakeEngine = engine_for,
    ) -> None:
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise ConfigurationError(f"config={config!r:.80} is not the config of a model; pass model.config.")
        self._closed = False
        self._streaming = Streaming(device_budget, host_budget, spill_dir, engine)
        self._lease: Lease | None = None  # on a store that others share; a PrefixStore is its owner's
        if isinstance(store, PrefixStore):
            self._store = store
        elif store is None or isinstance(store, (str, os.PathLike)):
            self._lease = Lease(store)
            self._store = self._lease.store
        else:
            raise ConfigurationError(
                f"store is a {type(store).__name__}, neither a folder nor a PrefixStore (pass a model's config as "
                "config=…)."
            )
        super().__init__(partial(self._streaming.open, self._store))
        self._turn: Turn | None = None
        self._held: Held | None = None
        self._snapshots = Snapshots()
        self._root: str | None = None
        self._longest_answer = 0
        self._lay_out(config)
        self.last_turn: TurnReport | None = None
        install()

    # --- layers -----------------------------------------------------------------------------------------------------

    def _lay_out(self, config: PreTrainedConfig | None) -> None:
        super()._lay_out(config)
        self._held = None
        self._snapshots.lose()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[batch, heads, new tokens, dim]`` to a layer; return the K and V that attention must see.

        Raises:
            BudgetError: ``device_budget`` is too small for so many tokens.
            ClosedError: the cache was closed.
            StreamError: a page of a cold layer is lost, or cannot be written.
            PromptError: no turn has begun, and a model's own ``generate`` may be running that could not be seen.
            UninstalledError: ``uninstall()`` was called, and no turn has begun.
        """
        if self._turn is None:
            self._check_open()
            check_installed()
            if self._held is not None or (layer_idx == 0 and not self.get_seq_length()):
                look_for_own_generate(holds_turn=self._held is not None)
            self._held = None  # tokens that nobody named
        else:
            begin = self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0
            self._turn.appending(begin, key_states.shape[-2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        """Hold nothing. The store keeps what it has."""
        self._end_turn()
        self._lay_out(self._config)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens."""
        self._snapshots.live = None
        super().crop(tokens_to_remove)
        if self._turn is not None and tokens_to_remove:
            self._turn.cropped = True
            if self._turn.fed is not None:
                self._turn.fed.cut(self.get_seq_length())

    def _move_rows(self, rows: torch.Tensor, move: Callable[[Any], None]) -> None:
        before, turn = self._row_count, self._turn
        # Until every layer has moved, an interrupt leaves rows that differ between layers: nothing of it can be kept.
        self._turn, self._held = (Turn.off("rows were being moved") if turn else None), None
        super()._move_rows(rows, move)
        self._turn = turn
        if turn is not None:
            turn.rows_moved(rows, before)

    # --- the turn ---------------------------------------------------------------------------------------------------

    def begin(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> TurnReport:
        """Begin a turn: match the prompt, hold the longest known prefix of it.

        For loops that call the model themselves; ``generate`` does it by itself. Feed the model the tokens from column
        ``get_seq_length()`` on, then call ``commit``.

        Args:
            model: the model that will be called.
            input_ids: ``[batch, columns]``, the whole prompt.
            attention_mask: ``[batch, columns]``; rows may be padded on the left.

        Raises:
            ClosedError: the cache was closed.
            PromptError: ``attention_mask`` does not fit ``input_ids``.
        """
        off = why_not_begin(model, input_ids)
        while True:
            report = self._begin(model, input_ids, attention_mask, off=off, feeds=False)
            try:
                if self._turn is not None and self._turn.prefix is not None:
                    self._turn.prefix.wait()
            except BlockError:
                self.reset()  # the block was discarded: begin again with what is left
                continue
            return report

    def _begin(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        *,
        off: str | None = None,
        cold: str | None = None,
        longest_answer: int = 0,
        repeats: int = 1,
        feeds: bool = True,
        prompt: Prompt | None = None,
        watched: bool = False,
        custom: bool = False,
    ) -> TurnReport:
        self._check_open()
        self._longest_answer = longest_answer
        self._salvage()
        config = getattr(model, "config", None)
        if not isinstance(config, PreTrainedConfig):
            off = off or "the model has no config"
        elif config is not self._config:
            self._lay_out(config)
        off = off or self._no_reuse or (why_off(model) if config is not None else None)
        if prompt is None and input_ids is not None and not off:
            read = read_prompt(input_ids, attention_mask)
            if isinstance(read, Unreadable):
                off = read.reason
            else:
                prompt = read
        if prompt is None or off or prompt.columns == 0 or not prompt.rows:
            return self._start(Turn.off(off or "the prompt is empty"))
        started = time.perf_counter()
        identity = identify(model, self._store.namespace, self._store.block_size)
        if isinstance(identity, Unsound):
            return self._start(Turn.off(identity.reason))
        changed = self._root is not None and identity.root != self._root
        if changed:
            self._lay_out(self._config)
        self._root = identity.root
        states = bool(self._states)
        if states and self._is_spread(model):
            return self._start(Turn.off("states of layers on several devices are not restored"))
        if self._hides_rows(prompt):
            cold = cold or "padding on the right is all that a window shows at the end of a row"
        if cold:
            if states:
                return self._start(Turn.off(cold))  # drafts that were taken back would still be in the states
            fed = Fed(prompt) if watched and prompt.plain else None
            return self._start(Turn(prompt, identity, None, cold, prompt_only=True, fed=fed, custom=custom))
        while True:
            turn = plan_turn(prompt, identity, self._held_now(), self._store, self._prefix_for(model), states=states)
            turn.match_seconds = time.perf_counter() - started
            if turn.prefix is None:
                if not any(turn.known):
                    turn.reason = "nothing known begins so"
                if changed:
                    turn.reason = "the model is not the one that filled this cache"
                elif turn.known_columns > max(prompt.pads) and states:
                    turn.reason = _why_no_states(prompt)
            if states:
                turn.keeps_answer_states = not decodes_otherwise(model)
                plan_pieces(
                    turn, token_by_token=takes_token_by_token(model), may_feed=feeds and repeats == 1 and prompt.plain
                )
            if watched and prompt.plain:
                turn.fed = Fed(prompt, turn.prefix.columns if turn.prefix is not None else 0)
            try:
                return self._start(turn, model, repeats)
            except BlockError:
                continue  # blocks that do not fit the model: they were discarded

    @staticmethod
    def _is_spread(model: PreTrainedModel) -> bool:
        """Whether the layers of ``model`` are on several devices."""
        return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1

    def _prefix_for(self, model: PreTrainedModel) -> MakePrefix:
        if self._streams is None:
            return TurnPrefix
        return partial(StreamedPrefix, self._streams, None if self._is_spread(model) else model.device)

    def _hides_rows(self, prompt: Prompt) -> bool:
        """Whether the last column of a row sees none of its tokens: what comes then depends on how it was fed."""
        trailing = max(prompt.columns - pad - len(row) for row, pad in zip(prompt.rows, prompt.pads, strict=True))
        if trailing <= 0:
            return False
        text = self._config.get_text_config(decoder=True) if self._config is not None else None
        windows = [layer.sliding_window for layer in self._windows if isinstance(layer, SlidingWindowLayer)]
        return bool(windows) and (trailing >= min(windows) or bool(getattr(text, "attention_chunk_size", None)))

    def _held_now(self) -> Held | None:
        """Return what all windows hold, cut to their length: a crop between turns shortens it."""
        if self._held is None or not self.layers:
            return None
        if not self._windows:
            return self._held
        lengths = {layer.length for layer in self._filled}
        if len(lengths) != 1 or not all(layer.complete for layer in self._filled):
            return None
        return self._held.cut(lengths.pop())

    @property
    def _filled(self) -> list[WindowLayer]:
        return [layer for layer in self._windows if layer.is_used or not layer.is_optional]

    def _start(self, turn: Turn, model: PreTrainedModel | None = None, repeats: int = 1) -> TurnReport:
        self._held = None  # first of all: from here on, pages may land in the windows
        if turn.prefix is None:
            self._lay_out(self._config)
        else:
            layers = self._windows
            assert turn.prompt is not None
            try:
                if model is not None:
                    turn.prefix.repeats, turn.prefix.device = repeats, model.device
                turn.prefix.start([layer.window for layer in layers], turn.prompt.columns)
                for index, layer in enumerate(layers):
                    layer.expect(turn.prefix, index)
                if self._states and model is not None:
                    self._start_states(turn.prefix, model, repeats)
            except BaseException:
                turn.prefix.close()
                raise
        self._turn = turn
        self._fed_columns = turn.prefix.columns if turn.prefix is not None else 0
        if self._streams is not None:
            self._streams.begin_turn(turn.prompt.columns if turn.prompt is not None else 0, self._longest_answer)
        self.last_turn = turn.report()
        return self.last_turn

    def _start_states(self, prefix: TurnPrefix, model: PreTrainedModel, repeats: int) -> None:
        if not prefix.has_states:
            self._snapshots.go_on(self._states, repeats)
            return
        try:
            self._snapshots.put(self._states, prefix.states(), model.device, repeats)
        except UnreadableError as error:
            raise prefix.reject(f"the states of a snapshot cannot be used: {error}") from error

    def pass_over(self, reason: str) -> None:
        """Hold nothing, and report a turn that could neither reuse nor be kept."""
        self.reset()
        self.last_turn = Turn.off(reason).report()

    @property
    def _has_states(self) -> bool:
        return bool(self._states)

    @property
    def _fed(self) -> Fed | None:
        return self._turn.fed if self._turn is not None else None

    def _common_length(self) -> int:
        """Return the columns that every layer has."""
        return min((layer.length for layer in self._filled), default=self.get_seq_length())

    def _pieces(self) -> Sequence[tuple[int, int]]:
        return self._turn.pieces if self._turn is not None else ()

    def _passed(self, column: int) -> None:
        turn = self._turn
        if turn is None or turn.prompt is None or not self._states or turn.prompt.is_padded:
            return
        if column == turn.prompt.columns or column in turn.snapshot_columns:
            self._snapshots.take(self._states, column, len(turn.prompt.rows))

    def commit(
        self, sequences: torch.Tensor, name: str | None = None, *, pin: bool = False, ttl: float | None = None
    ) -> TurnReport:
        """End a turn: keep the tokens whose K and V all layers hold.

        Args:
            sequences: ``[rows, columns]``, the prompt as it was given to ``begin`` and all tokens after it.
            name: what to call what is kept of the first row from now on, see ``name``.
            pin: never evict it.
            ttl: seconds after its last use at which it is forgotten.

        Raises:
            ClosedError: the cache was closed.
            ConfigurationError: ``name`` or ``ttl`` cannot be used.
            PromptError: no turn has begun, or ``sequences`` do not begin with its prompt, or there is nothing to name.
            StoreError: the name cannot be kept; the turn has ended all the same.
        """
        self._check_open()
        if name is not None:
            checked_name(name)
            checked_ttl(ttl)
        if self._turn is None:
            raise PromptError("commit() without begin(): call begin(model, input_ids, attention_mask) first")
        if sequences.ndim != 2:
            raise PromptError(f"sequences must be [rows, columns], not {sequences.ndim}-dimensional")
        prompt = self._turn.prompt
        if prompt is not None and not prompt.begins(sequences):
            raise PromptError("sequences do not begin with the prompt that begin() was given")
        report = self._commit(sequences, ())
        if name is not None:
            self.name(name, pin=pin, ttl=ttl)
        return report

    def name(self, name: str, *, row: int = 0, pin: bool = False, ttl: float | None = None) -> NamedPrefix:
        """Give a name to what the last turn kept, in the store; what bore it before loses it, pin and ttl pass on.

        Args:
            name: 1 to 200 printable characters.
            row: which row of the batch.
            pin: never evict it.
            ttl: seconds after its last use at which it is forgotten, pinned or not.

        Raises:
            ClosedError: the cache was closed.
            ConfigurationError: ``name`` or ``ttl`` cannot be used.
            PromptError: the last turn kept nothing, or has no such row.
            StoreError: the store does not have it, e.g. for want of room, or the disk fails.
        """
        self._check_open()
        if self._held is None or self._root is None or not 0 <= row < len(self._held.rows):
            reason = self.last_turn.miss_reason if self.last_turn is not None else "there was none"
            raise PromptError(f"row {row} of the last turn cannot be named: nothing of it was kept ({reason})")
        return self._store.name(name, self._root, self._held.rows[row], pin=pin, ttl=ttl)

    def _commit(self, sequences: torch.Tensor | None, eos_ids: Iterable[int], *, whole: bool = True) -> TurnReport:
        turn, self._turn = self._turn, None
        assert turn is not None
        generated = turn.generated(sequences, eos_ids) if sequences is not None else []
        named = turn.named(generated, self._row_count, self._common_length(), list(eos_ids))
        if named is not None and turn.identity is not None:
            self._keep(named, turn, whole)
        if turn.prefix is not None:
            turn.prefix.close()
        report = turn.report(generated)
        self.last_turn = self._streams.account(report) if self._streams is not None else report
        return self.last_turn

    def _keep(self, named: Held, turn: Turn, whole: bool) -> None:
        """Keep the tokens whose K and V every window holds; ``whole``: no forward pass was interrupted."""
        layers = self._filled
        if not all(layer.complete and layer.rows == len(named.rows) for layer in layers):
            self._lay_out(self._config)
            return
        length = self._common_length()
        for layer in layers:  # an interrupt may have left some layers a step ahead
            layer.length = length
        held = named.cut(length)
        states = self._states_of(held, turn, length, whole) if self._states else None
        try:
            self._store_rows(held, turn, states)
        except StreamError as error:
            _log.warning("this turn is not kept: %s", error)
            self._lay_out(self._config)
            return
        except (ClosedError, MemoryError, torch.OutOfMemoryError) as error:
            # The answer is there: it must not be lost because it cannot be kept.
            _log.warning("this turn is not kept in the store: %s", error)
        self._held = replace(held, live=self._snapshots.live)

    def _store_rows(self, held: Held, turn: Turn, states: Sequence[Mapping[int, torch.Tensor]] | None) -> None:
        assert turn.identity is not None
        root, manifest = turn.identity.root, turn.identity.manifest
        windows = [layer.window for layer in self._windows]
        for row, (tokens, pad) in enumerate(zip(held.rows, held.pads, strict=True)):
            read = partial(host_pages, windows, row, pad)
            self._store.commit(root, tokens, read, manifest, None if states is None else states[row])

    def _states_of(self, held: Held, turn: Turn, length: int, whole: bool) -> list[dict[int, torch.Tensor]]:
        """Return, of each row, the states that are known, by the number of tokens after which they are valid."""
        by_row = []
        live = whole
        for row, prompt_row in enumerate(turn.prompt_rows(len(held.rows))):
            states = self._snapshots.of(prompt_row)
            at_end = whole and held.pads[row] == 0 and len(held.rows[row]) == length
            if at_end and turn.keeps_answer_states and length not in states:
                last = self._snapshots.take_last(self._states, row)
                if last is not None:
                    states[length] = last
            live = live and at_end and length in states
            by_row.append({column: blob for column, blob in states.items() if column <= length and not held.pads[row]})
        self._snapshots.lose()
        self._snapshots.live = length if live else None
        return by_row

    def _salvage(self) -> None:
        turn = self._turn
        if turn is None:
            return
        # In a first pass that was interrupted, a window that is still to be filled looks like one that never is.
        begun = all(layer.complete and layer.length and layer.window is not None for layer in self._windows)
        if turn.prompt is not None and begun and (self._windows or self._snapshots.taken):
            turn.prompt_only = True
            self._commit(None, (), whole=False)
        else:
            self.reset()

    def _can_start_again(self) -> bool:
        return any(not layer.complete for layer in self._windows)

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None and turn.prefix is not None:
            turn.prefix.close()

    # --- resources --------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this TieredCache was closed; make a new one")

    @property
    def store(self) -> PrefixStore:
        """The store behind this cache."""
        return self._store

    def flush(self) -> None:
        """Wait until everything committed so far is on disk."""
        self._check_open()
        self._store.flush()

    def close(self) -> None:
        """Let go of the windows; write what is queued. Closes a store that was opened here and nobody else uses."""
        if self._closed:
            return
        self._end_turn()
        self._let_go()
        self._held, self._closed = None, True
        if self._streams is not None:
            self._streams.close()
        if not self._store.closed:
            self._store.flush()
        if self._lease is not None:
            self._lease.close()

    def __enter__(self) -> TieredCache:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fork(self) -> TieredCache:
        """Return a second cache that holds the same, over the same store, and goes on by itself.

        The two share the memory of what they hold: a layer is copied when one of them first writes what the other
        reads. Of two that append, the first goes on in place. A turn that has begun is begun in both. With a
        ``device_budget``, which each has for itself, hot windows are copied at once. Caches that share memory must
        compute on the same stream.

        Raises:
            ClosedError: the cache was closed.
        """
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> TieredCache:
        """Do as ``fork`` does."""
        self._check_open()
        twin = TieredCache(self._store, config=self._config, **self._streaming.arguments)
        twin._lease = self._lease.twin() if self._lease is not None else None
        turn = self._turn
        if turn is not None and turn.prefix is not None and self._streams is None:
            turn.prefix.wait()  # what is on its way lands in windows that are about to be shared
        if twin._streams is not None and turn is not None and turn.prompt is not None:
            twin._streams.begin_turn(turn.prompt.columns, self._longest_answer)
        self._copy_layers_to(twin, memo)
        if turn is not None:
            twin._turn = turn.twin(memo if any(not layer.complete for layer in self._windows) else None)
        twin._held, twin._root, twin.last_turn = self._held, self._root, self.last_turn
        twin._snapshots, twin._fed_columns = copy.deepcopy(self._snapshots), self._fed_columns
        return twin

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def _why_no_states(prompt: Prompt) -> str:
    if prompt.is_padded:
        return "padding would go into the states of this model"
    return "the states of this model are not known within the known prefix"
