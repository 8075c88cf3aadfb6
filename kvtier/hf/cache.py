"""TieredCache: a transformers cache that knows its token ids."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from kvtier.errors import ConfigurationError
from kvtier.hf.compat.canary import try_upstream
from kvtier.hf.generate.hook import install
from kvtier.hf.generate.run import begin_loop, commit_loop
from kvtier.hf.identity.trusted_hooks import TrustedHooks
from kvtier.hf.inputs.vocabulary import checked_tokenizer
from kvtier.hf.layers.container import LayerContainer
from kvtier.hf.offload_config import OffloadConfig
from kvtier.hf.turn.choice.decision import is_weighed
from kvtier.hf.turn.exclusive_use import exclusively
from kvtier.hf.turn.manager import TurnManager
from kvtier.kv.allocation import writable_results
from kvtier.kv.codecs import Codec
from kvtier.offload.accounting import TransferStats
from kvtier.progress import ProgressEvent, progress_of
from kvtier.report import Totals, TurnReport
from kvtier.store import PrefixStore
from kvtier.store.names import NamedPrefix, checked_name, checked_ttl
from kvtier.store.open_stores import StoreHandle
from kvtier.transfer.accelerator import engine_for
from kvtier.transfer.engines import MakeEngine


class TieredCache(DynamicCache):
    """A ``past_key_values`` that never computes a known prefix twice.

    Guarantees: reused K and V were computed by the same model for the same tokens, compared id by id; their bytes are
    the computed bytes, unless the store has a codec that loses bits; a store that fails costs a recompute. One object
    serves one ``generate`` at a time. Inference only: K and V that require grad are detached.

    Args:
        store: a folder (one store for all caches of the process that name it), or a ``PrefixStore``. None: the folder
            that the environment variable ``KVTIER_STORE`` names, or without one, the process-wide store in RAM.
        config: the model's config, to make the layers before the first turn; otherwise the first turn makes them.
        device_budget: bytes for K and V on each device that computes, e.g. ``"6GiB"``, or ``"auto"`` for its free
            memory less a reserve; layers that do not fit are cold. None: all are hot. On a machine without accelerator
            that device is the RAM.
        disk_budget: bytes of files of a store that is opened by its folder, e.g. ``"20GiB"``; by default 50 GiB. Caches
            of one process share an open store, and so its budget: another value is an error.
        host_budget: bytes of RAM for pages of cold layers, beyond which they go to disk; by default half of the
            machine's RAM. Without accelerator, cold layers go to disk at once.
        spill_dir: folder for pages of cold layers; by default beside the store's blocks, or in the user's cache folder.
        page_compression: ``"raw"``, ``"zstd"`` or a codec (``kvtier.kv.codecs.base``) for pages of cold layers: less
            memory and smaller files, for the time to encode and decode. A lossy codec is part of the model's root.
        wait_seconds: how long ``generate``, ``begin``, ``commit`` and ``reset`` wait for a call that is using the cache
            on another thread, before ``BusyError``. 0: not at all.
        reuse: ``"auto"``: of a prefix that is known in the store, as much is loaded as is expected to be faster than to
            compute it again, by what both have cost on this machine so far; ``"always"``: all of it is loaded. None:
            what the environment variable ``KVTIER_REUSE`` says, or ``"auto"``.
        trusted_hooks: hooks on models that change neither K nor V, as functions or as names
            (``"package.module.function"``). Other hooks that kvtier does not know turn reuse off. Prefixes computed
            under a trusted hook are found again under that hook only: its name is part of the model's root.
        progress: True: bars in terminals and notebooks for prompts, loads, commits, flushes and rebuilt catalogs that
            take longer than half a second. Or a function that is told: it gets a ``kvtier.progress.ProgressEvent``.
        tokenizer: the tokenizer of the prompts, or its processor: its vocabulary is kept beside the blocks, so that
            ``kvtier store ls`` and ``show`` show text. Reuse does not need it. ``generate(tokenizer=…)`` sets it, too.
        engine: ``device`` → its copy engine; for tests and new kinds of devices.

    Raises:
        ConfigurationError: ``store`` is neither a path nor a ``PrefixStore``, ``config`` no config, a budget no byte
            count, ``disk_budget`` comes with a ``PrefixStore``, or without a folder, or differs from that of the open
            store, ``spill_dir`` is no path, ``page_compression`` no codec, ``wait_seconds`` no number of seconds,
            ``reuse`` neither of its words, ``trusted_hooks`` no list of hooks, ``progress`` no function, or
            ``tokenizer`` has no vocabulary.
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | PrefixStore | None = None,
        *,
        config: PreTrainedConfig | None = None,
        device_budget: int | str | None = None,
        disk_budget: int | str | None = None,
        host_budget: int | str | None = None,
        spill_dir: str | os.PathLike[str] | None = None,
        page_compression: str | Codec = "raw",
        wait_seconds: float = 0.0,
        reuse: str | None = None,
        trusted_hooks: Iterable[Any] = (),
        progress: bool | Callable[[ProgressEvent], object] = False,
        tokenizer: Any = None,
        engine: MakeEngine = engine_for,
    ) -> None:
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise ConfigurationError(f"config={config!r:.80} is not the config of a model; pass model.config.")
        self._progress, told = progress, progress_of(progress)
        self._told = told
        self._offload_config = OffloadConfig(device_budget, host_budget, spill_dir, page_compression, engine)
        self._handle: StoreHandle | None = None  # on a shared store; a passed PrefixStore belongs to the caller
        if store is None or isinstance(store, (str, os.PathLike)):
            self._handle = StoreHandle(store, disk_budget, told)
            store = self._handle.store
        elif not isinstance(store, PrefixStore):
            raise ConfigurationError(
                f"store is a {type(store).__name__}, neither a folder nor a PrefixStore (pass a model's config as "
                "config=…)."
            )
        elif disk_budget is not None:
            raise ConfigurationError(
                f"disk_budget={disk_budget!r} belongs to the store: pass it to the PrefixStore, not to the TieredCache."
            )
        self._container = LayerContainer(partial(self._offload_config.open, store), engine, store.block_size)
        lossy, weighs = self._offload_config.lossy_codec, is_weighed(reuse)
        self.turns = TurnManager(
            self._container,
            store,
            wait_seconds,
            lossy,
            weighs=weighs,
            trusted_hooks=TrustedHooks(trusted_hooks),
            progress=told,
        )
        self.tokenizer = tokenizer
        Cache.__init__(self, layers=[])
        install()
        try_upstream(lambda: TieredCache(PrefixStore()))
        self.turns.lay_out(config)

    def __repr__(self) -> str:
        """Return what the cache holds, and the place of its store."""
        held, turns = self._container, self.turns.log.totals.turns
        rows = f" in {held.row_count} rows" if held.row_count > 1 else ""
        state = "closed" if self.turns.closed else f"{held.columns:,} tokens{rows}, {len(held.layers)} layers"
        return f"<TieredCache over {self.store!r}: {state}, {turns:,} turn{'s' * (turns != 1)}>"

    @property
    def last_turn(self) -> TurnReport | None:
        """The report of the last turn that has begun; None before the first."""
        return self.turns.last_turn

    @property
    def history(self) -> tuple[TurnReport, ...]:
        """The reports of the last 1,000 turns that have ended, the oldest first. A fork begins with none."""
        return self.turns.log.reports

    @property
    def totals(self) -> Totals:
        """Sums over all turns that have ended since the cache was made or forked."""
        return self.turns.log.totals

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that shows stored prefixes as text; None if it is not known. It may be set at any time.

        Raises:
            ConfigurationError: it is set to an object without a vocabulary.
        """
        return self.turns.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.turns.tokenizer = checked_tokenizer(tokenizer)

    @property
    def wait_seconds(self) -> float:
        """How long ``generate``, ``begin``, ``commit`` and ``reset`` wait for a call on another thread."""
        return self.turns.wait_seconds

    @property
    def transfers(self) -> TransferStats | None:
        """Counts of offload transfers since the cache was made; None without a ``device_budget``."""
        offload = self._container.offload
        return offload.transfers.copy() if offload is not None else None

    # --- a cache of transformers ------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[Any]:
        """The layers, as transformers has them."""
        return self._container.layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._container.layers = layers

    @layers.deleter
    def layers(self) -> None:
        raise ConfigurationError("the layers of a TieredCache cannot be deleted; call reset() to let it hold nothing")

    # Excluded from torch.compile: it waits for pages, and its buffers outlive the pass.
    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[batch, heads, new tokens, dim]`` to a layer; return the K and V that attention must see.

        Raises:
            BudgetError: ``device_budget`` is too small for so many tokens.
            BusyError: something other than the running ``generate()`` has changed the layer.
            ClosedError: the cache was closed.
            StreamError: a page of a cold layer is lost, or cannot be written.
            UnannouncedError: no turn has begun, kvtier did not see the running ``generate()``, the cache holds tokens.
            UninstalledError: ``uninstall()`` was called, and no turn has begun.
        """
        layers = self._container.layers
        layer = layers[layer_idx] if layer_idx < len(layers) else self._container.layer(layer_idx)
        self.turns.appending(layer_idx, layer, key_states.shape[2])
        states: tuple[torch.Tensor, torch.Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        return states

    @torch.compiler.disable
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return a layer's convolution state; None before the first token.

        Raises:
            ConfigurationError: the cache has no such layer with states.
        """
        self.turns.changing_states()
        self._container.calling("get_conv_state", layer_idx, state_idx, fed=1)
        state: torch.Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state

    @torch.compiler.disable
    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Give a layer ``[batch, channels, new tokens]``; return the tensor that the convolution must see.

        Raises:
            ConfigurationError: the cache has no such layer with states.
        """
        self.turns.changing_states()
        self._container.calling("update_conv_state", layer_idx, state_idx, fed=conv_states.shape[-1] - 1)
        with writable_results():
            seen: torch.Tensor = super().update_conv_state(conv_states.detach(), layer_idx, state_idx, **kwargs)
        return seen

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return a layer's recurrent state; None before the first token.

        Raises:
            ConfigurationError: the cache has no such layer with states.
        """
        self._container.check_has_states(layer_idx)
        state: torch.Tensor | None = super().get_recurrent_state(layer_idx, state_idx)
        return state

    @torch.compiler.disable
    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Set the recurrent state of a layer, and return it.

        Raises:
            ConfigurationError: the cache has no such layer with states.
        """
        self.turns.changing_states()
        self._container.calling("update_recurrent_state", layer_idx, state_idx)
        with writable_results():
            state: torch.Tensor = super().update_recurrent_state(
                recurrent_states.detach(), layer_idx, state_idx, **kwargs
            )
        return state

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether a layer with states, by default the last one, has seen tokens.

        Raises:
            ConfigurationError: the cache has no such layer with states.
        """
        if layer_idx is None or layer_idx < len(self.layers):
            self._container.check_has_states(layer_idx)
        state = (layer_idx,) if state_idx is None else (layer_idx, state_idx)
        return bool(super().has_previous_state(*state))

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return whether a layer records its past states, as ``crop`` needs."""
        return layer_idx < len(self.layers) and bool(getattr(self.layers[layer_idx], "record_past", False))

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Append ``[batch, new tokens, dim]`` to a layer's indexer; return the indexer's keys of all tokens.

        Raises:
            ConfigurationError: the cache has no such layer with an indexer.
        """
        if layer_idx >= len(self.layers) or not hasattr(self.layers[layer_idx], "update_indexer"):
            raise self._container.no_layer(layer_idx, "an indexer")
        keys: torch.Tensor = self.layers[layer_idx].update_indexer(indexer_key_states)
        return keys

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns that ``layer_idx`` holds; if no layer counts them, the columns that were fed."""
        if not self._container.counts_columns:
            return self._container.fed_columns
        return int(super().get_seq_length(layer_idx))

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the largest limit of visible columns, of one layer or of all; -1 if no layer has a limit."""
        layers = self.layers if layer_idx is None else self.layers[layer_idx : layer_idx + 1]
        return max((int(layer.get_max_length()) for layer in layers if hasattr(layer, "get_max_length")), default=-1)

    @property
    def is_compileable(self) -> bool:
        """Return False: the cache counts its tokens in Python."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Return whether ``crop`` can remove tokens from every layer."""
        return all(bool(getattr(layer, "is_croppable", False)) for layer in self.layers)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]``."""
        self.turns.move_rows(beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self.turns.move_rows(indices, lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        rows = torch.arange(self._container.row_count, device="cpu").repeat_interleave(repeats)
        self.turns.move_rows(rows, lambda layer: layer.batch_repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens."""
        self.turns.cropping()
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.turns.cropped()

    def reset(self) -> None:
        """Drop all content. The store keeps its blocks.

        Raises:
            BusyError: another call is using the cache.
        """
        exclusively(self.turns, "reset()", self.turns.start_over)

    # --- turns in a custom loop ---

    def begin(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> TurnReport:
        """Begin a turn: match the prompt and load its longest known prefix.

        For custom loops that call the model; ``generate`` begins its turns by itself. Feed the model the tokens from
        column ``get_seq_length()`` on, then call ``commit``.

        Args:
            model: the model that will be called.
            input_ids: ``[batch, columns]``, the whole prompt.
            attention_mask: ``[batch, columns]``; rows may be padded on the left.

        Raises:
            BusyError: another call is using the cache.
            ClosedError: the cache was closed.
            PromptError: ``attention_mask`` does not fit ``input_ids``.
        """
        self.turns.check_open()
        return exclusively(self.turns, "begin()", partial(begin_loop, self, model, input_ids, attention_mask))

    def commit(
        self, sequences: torch.Tensor, name: str | None = None, *, pin: bool = False, ttl: float | str | None = None
    ) -> TurnReport:
        """End a turn: keep the tokens whose K and V all layers hold.

        Args:
            sequences: ``[rows, columns]``, the prompt as it was given to ``begin`` and all tokens after it.
            name: name for the kept tokens of the first row, see ``name``.
            pin: never evict the named prefix.
            ttl: seconds after its last use at which the named prefix is forgotten, or a duration, e.g. ``"30d"``.

        Raises:
            BusyError: another call is using the cache.
            ClosedError: the cache was closed.
            ConfigurationError: ``name`` or ``ttl`` cannot be used.
            PromptError: no turn has begun, or ``sequences`` do not begin with its prompt, or there is nothing to name.
            StoreError: the name cannot be kept; the turn has ended nevertheless.
        """
        self.turns.check_open()
        return exclusively(self.turns, "commit()", partial(self._commit, sequences, name, pin, ttl))

    def _commit(self, sequences: torch.Tensor, name: str | None, pin: bool, ttl: float | str | None) -> TurnReport:
        self.turns.check_open()  # again: the cache may have been closed while this call waited
        if name is not None:
            checked_name(name)
            checked_ttl(ttl)
        report = commit_loop(self.turns, sequences)
        if name is not None:
            self.name(name, pin=pin, ttl=ttl)
        return report

    def name(self, name: str, *, row: int = 0, pin: bool = False, ttl: float | str | None = None) -> NamedPrefix:
        """Name the prefix that the last turn kept. An earlier prefix loses the name; its pin and ttl carry over.

        Args:
            name: 1 to 200 printable characters.
            row: which row of the batch.
            pin: never evict the named prefix.
            ttl: seconds after its last use at which the named prefix is forgotten, pinned or not, or a duration, e.g.
                ``"30d"``.

        Raises:
            ClosedError: the cache was closed.
            ConfigurationError: ``name`` or ``ttl`` cannot be used.
            PromptError: the last turn kept nothing, or has no such row.
            StoreError: the store does not have the prefix, e.g. for lack of room, or the disk fails.
        """
        self.turns.check_open()
        root, tokens = self.turns.kept_row(row)
        return self.store.name(name, root, tokens, pin=pin, ttl=ttl)

    # --- resources --------------------------------------------------------------------------------------------------

    @property
    def store(self) -> PrefixStore:
        """The store behind this cache."""
        return self.turns.store

    def flush(self, *, progress: bool | Callable[[ProgressEvent], object] | None = None) -> None:
        """Wait until all committed blocks are on disk.

        Args:
            progress: as for the cache, for this call alone; None does what the cache was told. The bytes of K and V are
                counted that were written, of those that were queued.

        Raises:
            ConfigurationError: ``progress`` is neither True, False, None nor a function.
        """
        told = self._told if progress is None else progress_of(progress)
        self.turns.check_open()
        self._container.settle()
        self.store.flush(progress=told or False)

    def close(self) -> None:
        """Release the buffers and write queued blocks. Closes a store that was opened here, unless other caches use it.

        A ``generate()`` call that is still running ends with a ``ClosedError`` at its next update.
        """
        if self.turns.closed:
            return
        self.turns.close()
        self._container.close()
        if not self.store.closed:
            self.store.flush()
        if self._handle is not None:
            self._handle.close()

    def __enter__(self) -> TieredCache:
        self.turns.check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fork(self) -> TieredCache:
        """Return an independent second cache with the same content, over the same store.

        The two share memory: a layer is copied when one cache first writes columns that the other reads. If both
        append, the first one continues in place. A turn that has begun continues in both. With a ``device_budget``,
        which each cache has for itself, hot buffers are copied at once. Caches that share memory must compute on the
        same stream.

        Raises:
            ClosedError: the cache was closed.
        """
        return copy.deepcopy(self)

    __copy__ = fork  # two caches with the same layers would overwrite each other's tokens

    def __reduce__(self) -> Any:
        """Refuse to be pickled, with a ``TypeError``."""
        raise TypeError(
            "a TieredCache cannot be pickled: what it knows is in its store. Open the store's folder in the other "
            "process, TieredCache(folder), and call generate() with the same tokens"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> TieredCache:
        """Do as ``fork`` does."""
        self.turns.check_open()
        arguments = dict(self._offload_config.arguments)
        arguments |= {"wait_seconds": self.wait_seconds, "progress": self._progress}
        twin = TieredCache(self.store, config=self._container.config, **arguments)
        twin._handle = self._handle.twin() if self._handle is not None else None
        self.turns.copy_to(twin.turns, memo)
        return twin


install()  # on import: Python looks up `model.generate` before it makes a cache in the arguments of that call (see also
# early_lookup.py, for `import kvtier`)
