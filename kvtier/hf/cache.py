"""TieredCache: a transformers cache that knows its tokens, and owns the turn."""

from __future__ import annotations

import copy
import logging
import os
from functools import partial
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvtier.errors import BlockError, ConfigurationError, PromptError
from kvtier.hf.compat.canary import try_upstream
from kvtier.hf.generate.hook import install
from kvtier.hf.inputs.positions import remember_positions
from kvtier.hf.inputs.request import read_loop_request
from kvtier.hf.layers.layer_marks import LayerMarks
from kvtier.hf.offload_config import OffloadConfig
from kvtier.hf.turn.exclusive_use import exclusively
from kvtier.hf.turn.manager import TurnCache
from kvtier.offload.manager import MakeEngine
from kvtier.report import TurnReport
from kvtier.store import PrefixStore
from kvtier.store.names import NamedPrefix, checked_name, checked_ttl
from kvtier.store.open_stores import StoreHandle
from kvtier.transfer import engine_for

_log = logging.getLogger("kvtier.hf")


class TieredCache(TurnCache):
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
        wait_seconds: how long ``generate``, ``begin``, ``commit`` and ``reset`` wait for a call that is using the cache
            on another thread, before ``BusyError``. 0: not at all.
        engine: ``device`` → what moves bytes there; for tests and new kinds of devices.

    Raises:
        ConfigurationError: ``store`` is neither a path nor a ``PrefixStore``, ``config`` no config, a budget no byte
            count, ``spill_dir`` no path, or ``wait_seconds`` no number of seconds.
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
        wait_seconds: float = 0.0,
        engine: MakeEngine = engine_for,
    ) -> None:
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise ConfigurationError(f"config={config!r:.80} is not the config of a model; pass model.config.")
        self._streaming = OffloadConfig(device_budget, host_budget, spill_dir, engine)
        self._lease: StoreHandle | None = None  # on a store that others share; a PrefixStore is its owner's
        if store is None or isinstance(store, (str, os.PathLike)):
            self._lease = StoreHandle(store)
            store = self._lease.store
        elif not isinstance(store, PrefixStore):
            raise ConfigurationError(
                f"store is a {type(store).__name__}, neither a folder nor a PrefixStore (pass a model's config as "
                "config=…)."
            )
        super().__init__(store, partial(self._streaming.open, store), wait_seconds)
        install()
        try_upstream(_cache_in_ram)
        self._lay_out(config)

    # --- turns in a loop of one's own ---

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
            BusyError: another call is using the cache.
            ClosedError: the cache was closed.
            PromptError: ``attention_mask`` does not fit ``input_ids``.
        """
        self._check_open()
        return exclusively(self, "begin()", partial(self._begin_loop, model, input_ids, attention_mask))

    def _begin_loop(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> TurnReport:
        request = read_loop_request(model, input_ids, attention_mask, self.resident())
        while True:
            report = self._begin(model, request)
            try:
                if self._turn is not None and self._turn.prefix is not None:
                    self._turn.prefix.wait()
            except BlockError:
                self.start_over()  # the block is not found again: begin with what is left
                continue
            if self._turn is not None and self._turn.prompt is not None:
                remember_positions(model, self._turn.prompt)
            return report

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
            BusyError: another call is using the cache.
            ClosedError: the cache was closed.
            ConfigurationError: ``name`` or ``ttl`` cannot be used.
            PromptError: no turn has begun, or ``sequences`` do not begin with its prompt, or there is nothing to name.
            StoreError: the name cannot be kept; the turn has ended all the same.
        """
        self._check_open()
        return exclusively(self, "commit()", partial(self._commit_loop, sequences, name, pin, ttl))

    def _commit_loop(self, sequences: torch.Tensor, name: str | None, pin: bool, ttl: float | None) -> TurnReport:
        self._check_open()  # again: the cache may have been closed while this call waited
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
        if self._resident is None or self._root is None or not 0 <= row < len(self._resident.rows):
            reason = self.last_turn.miss_reason if self.last_turn is not None else "there was none"
            raise PromptError(f"row {row} of the last turn cannot be named: nothing of it was kept ({reason})")
        return self._store.name(name, self._root, self._resident.rows[row], pin=pin, ttl=ttl)

    # --- resources --------------------------------------------------------------------------------------------------

    @property
    def store(self) -> PrefixStore:
        """The store behind this cache."""
        return self._store

    def flush(self) -> None:
        """Wait until everything committed so far is on disk."""
        self._check_open()
        self._store.flush()

    def close(self) -> None:
        """Let go of the buffers; write what is queued. Closes a store that was opened here and nobody else uses.

        Inside ``generate()``, that call ends with a ``ClosedError`` if it goes on.
        """
        if self._closed:
            return
        self._end_turn()
        self._let_go()
        self._resident, self._closed = None, True
        if self._offload is not None:
            self._offload.close()
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
        ``device_budget``, which each has for itself, hot buffers are copied at once. Caches that share memory must
        compute on the same stream.

        Raises:
            ClosedError: the cache was closed.
        """
        return copy.deepcopy(self)

    def __copy__(self) -> TieredCache:
        """Do as ``fork`` does: two caches with the same layers would each overwrite what the other knows."""
        return copy.deepcopy(self)

    def __reduce__(self) -> Any:
        """Refuse to be pickled.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a TieredCache cannot be pickled: what it knows is in its store. Open the store's folder in the other "
            "process, TieredCache(folder), and call generate() with the same tokens"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> TieredCache:
        """Do as ``fork`` does."""
        self._check_open()
        twin = TieredCache(
            self._store, config=self._config, wait_seconds=self.wait_seconds, **self._streaming.arguments
        )
        twin._lease = self._lease.twin() if self._lease is not None else None
        turn = self._turn
        if turn is not None and turn.prefix is not None and self._offload is None:
            turn.prefix.wait()  # what is on its way lands in buffers that are about to be shared
        if twin._offload is not None and turn is not None and turn.prompt is not None:
            twin._offload.begin_turn(turn.prompt.columns, self._longest_answer)
        self._copy_layers_to(twin, memo)
        if turn is not None:
            twin._turn = turn.twin(memo if any(not layer.complete for layer in self._attention_layers) else None)
        if self._resident is not None and self._marks is not None and self._marks.still_hold(self.layers):
            twin._resident, twin._marks = self._resident, LayerMarks(twin.layers)
        twin._root, twin.last_turn, twin._calls = self._root, self.last_turn, self._calls.copy()
        twin._checkpoints, twin._fed_columns = copy.deepcopy(self._checkpoints), self._fed_columns
        return twin

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def _cache_in_ram() -> TieredCache:
    """Return a cache over a store of its own."""
    return TieredCache(PrefixStore())


install()  # Python takes `generate` from the model before it makes a cache among the arguments of the call
