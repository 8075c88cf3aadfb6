"""TieredCache: a transformers cache that knows its tokens, and owns the turn."""

from __future__ import annotations

import copy
import os
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from kvtier.errors import BlockError, ClosedError, ConfigurationError, PromptError
from kvtier.hf.identity import Identity, identify
from kvtier.hf.layers import WindowLayer, build_layers
from kvtier.hf.prompt import Prompt, Unreadable, read_prompt
from kvtier.hf.turn import Held, RowPlan, Turn, TurnPrefix
from kvtier.report import RowReport, TurnReport
from kvtier.store import PrefixStore
from kvtier.store.base import Page
from kvtier.store.chain import TokenIds
from kvtier.store.store import PrefixMatch, Restore

_shared: dict[str, tuple[PrefixStore, weakref.WeakSet[TieredCache]]] = {}
_shared_lock = threading.Lock()


class TieredCache(DynamicCache):
    """A ``past_key_values`` that never computes a known prefix twice.

    Guarantees: what is reused was computed for the same tokens by the same model, compared id by id; K and V are the
    bytes that were computed; a store that fails costs a recompute. One object serves one ``generate`` at a time.
    Inference only: K and V that require grad are detached.

    Args:
        store: a folder (one store for all caches of the process that name it), a ``PrefixStore``, or None for the
            process-wide store in RAM.
        config: the model's config, to lay out layers before the first turn; otherwise the first turn does it.

    Raises:
        ConfigurationError: ``store`` is neither a path nor a ``PrefixStore``.
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | PrefixStore | None = None,
        *,
        config: PreTrainedConfig | None = None,
    ) -> None:
        Cache.__init__(self, layers=[])
        self._closed = False
        self._store, self._shared_key = _open_store(store, self)
        self._config = config
        self._no_reuse: str | None = None
        self._turn: Turn | None = None
        self._held: Held | None = None
        self._root: str | None = None
        self._lay_out(config)
        self.last_turn: TurnReport | None = None
        from kvtier.hf.generate import install  # here, because generate.py needs this class

        install()

    # --- layers -----------------------------------------------------------------------------------------------------

    def _lay_out(self, config: PreTrainedConfig | None) -> None:
        self._config = config
        self.layers, self._no_reuse = build_layers(config) if config is not None else ([], None)
        self._held = None

    @property
    def _windows(self) -> list[WindowLayer]:
        return [layer for layer in self.layers if isinstance(layer, WindowLayer)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[batch, heads, new tokens, dim]`` to a layer; return the K and V that attention must see.

        Raises:
            ClosedError: the cache was closed.
        """
        if self._turn is None:
            self._check_open()
            self._held = None  # tokens that nobody named
        while len(self.layers) <= layer_idx:
            self.layers.append(WindowLayer())
        states: tuple[torch.Tensor, torch.Tensor] = self.layers[layer_idx].update(
            key_states, value_states, *args, **kwargs
        )
        return states

    def reset(self) -> None:
        """Hold nothing. The store keeps what it has."""
        self._end_turn()
        self._lay_out(self._config)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens."""
        super().crop(tokens_to_remove)
        if self._turn is not None:
            self._turn.prompt_only = True

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]``."""
        self._move_rows(beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self._move_rows(indices, lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        rows = torch.arange(self._row_count).repeat_interleave(repeats)
        self._move_rows(rows, lambda layer: layer.batch_repeat_interleave(repeats))

    @property
    def _row_count(self) -> int:
        return max((layer.rows for layer in self._windows), default=0)

    def _move_rows(self, rows: torch.Tensor, move: Any) -> None:
        before, turn = self._row_count, self._turn
        # Until every layer has moved, an interrupt leaves rows that differ between layers: nothing of it can be kept.
        self._turn, self._held = (Turn(None, None, None, "rows were being moved") if turn else None), None
        for layer in self.layers:
            move(layer)
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
        while True:
            report = self._begin(model, input_ids, attention_mask)
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
    ) -> TurnReport:
        """Begin a turn whose pages may still be on their way.

        Args:
            model: the model that will be called.
            input_ids: ``[batch, columns]``.
            attention_mask: ``[batch, columns]``.
            off: why this turn must neither reuse nor be kept.
            cold: why this turn must not reuse, though its prompt may be kept.
        """
        self._check_open()
        self._salvage()
        if self._config is None or not self.layers:
            config = getattr(model, "config", None)
            if isinstance(config, PreTrainedConfig):
                self._lay_out(config)
            else:
                off = off or "the model has no config"
        off = off or self._no_reuse or _unsound(model)
        prompt = read_prompt(input_ids, attention_mask) if input_ids is not None and not off else None
        if isinstance(prompt, Unreadable):
            off, prompt = prompt.reason, None
        if prompt is None or off or prompt.columns == 0 or not prompt.rows:
            return self._start(Turn(None, None, None, off or "the prompt is empty"))
        started = time.perf_counter()
        identity = identify(model, self._store.namespace, self._store.block_size)
        if identity.root != self._root:
            changed, self._held, self._root = self._held is not None, None, identity.root
        else:
            changed = False
        if cold:
            return self._start(Turn(prompt, identity, None, cold, prompt_only=True))
        turn = self._plan(prompt, identity)
        turn.match_seconds = time.perf_counter() - started
        if turn.prefix is None:
            turn.reason = "the model is not the one that filled this cache" if changed else "nothing known begins so"
        return self._start(turn)

    def _plan(self, prompt: Prompt, identity: Identity) -> Turn:
        """Find the longest prefix that windows and store hold together, and open what the store adds."""
        held = self._held_now()
        plans, window_tokens = [], []
        for row, (tokens, pad) in enumerate(zip(prompt.rows, prompt.pads, strict=True)):
            source, run = held.best(tokens, row) if held else (0, 0)
            plans.append(RowPlan(pad, source, held.pads[source] if held else 0, run))
            window_tokens.append(run)
        while True:
            matches = [self._store.match(identity.root, tokens, len(tokens) - 1) for tokens in prompt.rows]
            known = [max(w, m.length) for w, m in zip(window_tokens, matches, strict=True)]
            limit = prompt.columns - 1  # the model must still be fed one token
            columns = min([limit, *(pad + n for pad, n in zip(prompt.pads, known, strict=True))])
            if all(columns <= pad for pad in prompt.pads):
                return Turn(prompt, identity, None, matches=matches)
            needed = [
                _between(m, w, columns - pad) for m, w, pad in zip(matches, window_tokens, prompt.pads, strict=True)
            ]
            try:
                restore = self._store.restore(needed) if any(m.spans for m in needed) else None
            except BlockError:
                continue  # it was discarded
            break
        prefix = TurnPrefix(columns, plans, restore, len(held.rows) if held else 0)
        turn = Turn(prompt, identity, prefix, matches=matches)
        turn.cached_by_tier = _by_tier(prompt, columns, window_tokens, needed, restore)
        return turn

    def _held_now(self) -> Held | None:
        """Return what all windows hold, cut to their length: a crop between turns shortens it."""
        if self._held is None or not self._windows:
            return None
        lengths = {layer.length for layer in self._windows}
        if len(lengths) != 1 or not all(layer.complete for layer in self._windows):
            return None
        length = lengths.pop()
        rows = tuple(row[: max(0, length - pad)] for row, pad in zip(self._held.rows, self._held.pads, strict=True))
        return Held(rows, self._held.pads)

    def _start(self, turn: Turn) -> TurnReport:
        if turn.prefix is None:
            self._lay_out(self._config)
        else:
            windows = self._windows
            turn.prefix.attach(len(windows))
            for index, layer in enumerate(windows):
                layer.expect(turn.prefix, index)
        self._turn, self._held = turn, None
        self.last_turn = _report(turn, ())
        return self.last_turn

    def commit(self, sequences: torch.Tensor) -> TurnReport:
        """End a turn: keep the tokens whose K and V all layers hold.

        Args:
            sequences: ``[rows, columns]``, the prompt as it was given to ``begin`` and all tokens after it.

        Raises:
            ClosedError: the cache was closed.
            PromptError: no turn has begun, or ``sequences`` do not begin with its prompt.
        """
        self._check_open()
        if self._turn is None:
            raise PromptError("commit() without begin(): call begin(model, input_ids, attention_mask) first")
        if sequences.ndim != 2:
            raise PromptError(f"sequences must be [rows, columns], not {sequences.ndim}-dimensional")
        prompt = self._turn.prompt
        if prompt is not None and not _begins_with(sequences, prompt):
            raise PromptError("sequences do not begin with the prompt that begin() was given")
        return self._commit(sequences, ())

    def _commit(self, sequences: torch.Tensor | None, eos_ids: Iterable[int]) -> TurnReport:
        """Keep prompt and generated tokens; ``sequences`` None keeps the prompt alone."""
        turn, self._turn = self._turn, None
        assert turn is not None
        generated: list[TokenIds] = []
        if turn.prompt is not None:
            rows = self._row_count
            row_of = turn.row_of or (turn.expanded(rows) if rows else [])
            by_row = sequences is not None and not turn.prompt_only and sequences.shape[0] == rows
            if sequences is not None:
                new = sequences[:, turn.prompt.columns :].detach().to("cpu", torch.int64).numpy()
                generated = [_until_eos(ids, eos_ids) for ids in new]
            tails = generated if by_row else [np.empty(0, np.int64)] * rows
            tokens = [np.concatenate([turn.prompt.rows[p], tail]) for p, tail in zip(row_of, tails, strict=False)]
            pads = tuple(turn.prompt.pads[p] for p in row_of)
            self._keep(turn, tokens, pads)
        if turn.prefix is not None:
            turn.prefix.close()
        self.last_turn = _report(turn, generated)
        return self.last_turn

    def _keep(self, turn: Turn, tokens: Sequence[TokenIds], pads: tuple[int, ...]) -> None:
        windows = self._windows
        if not windows or not tokens or len(tokens) != self._row_count:
            return
        if not all(layer.complete and layer.rows == len(tokens) for layer in windows):
            self._lay_out(self._config)
            return
        length = min(layer.length for layer in windows)
        for layer in windows:  # an interrupt may have left some layers a step ahead
            layer.length = length
        known = tuple(row[: max(0, length - pad)] for row, pad in zip(tokens, pads, strict=True))
        assert turn.identity is not None
        for r, row in enumerate(known):

            def read(start: int, stop: int, r: int = r) -> tuple[Page, ...]:
                columns = slice(pads[r] + start, pads[r] + stop)
                return tuple(_page(layer, r, columns) for layer in windows)

            self._store.commit(turn.identity.root, row, read, turn.identity.manifest)
        self._held = Held(known, pads)

    def _salvage(self) -> None:
        """End a turn that was interrupted: keep the part of its prompt that every layer has."""
        turn = self._turn
        if turn is None:
            return
        if turn.prompt is not None and self._windows and all(w.complete and w.length for w in self._windows):
            turn.prompt_only = True
            self._commit(None, ())
        else:
            self.reset()

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
        self.layers, self._held, self._closed = [], None, True
        if not self._store.closed:
            self._store.flush()
        if self._shared_key is not None:
            with _shared_lock:
                store, users = _shared[self._shared_key]
                users.discard(self)
                if users or self._shared_key == "":
                    return
                del _shared[self._shared_key]
            store.close()

    def __enter__(self) -> TieredCache:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> TieredCache:
        """Copy the windows; share the store."""
        twin = TieredCache(self._store, config=self._config)
        twin.layers = copy.deepcopy(self.layers, memo)
        twin._held, twin._root, twin.last_turn = self._held, self._root, self.last_turn
        if self._shared_key is not None:
            with _shared_lock:
                twin._shared_key = self._shared_key
                _shared[self._shared_key][1].add(twin)
        return twin

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def _open_store(
    target: str | os.PathLike[str] | PrefixStore | None, cache: TieredCache
) -> tuple[PrefixStore, str | None]:
    """Return the store to use, and the name it is shared under (None: it is the caller's own)."""
    if isinstance(target, PrefixStore):
        return target, None
    if target is not None and not isinstance(target, (str, os.PathLike)):
        raise ConfigurationError(
            f"store={target!r} is neither a folder nor a PrefixStore (pass a model's config as config=…)."
        )
    path = str(Path(target).expanduser().resolve()) if target is not None else None
    key = path or ""
    with _shared_lock:
        if key not in _shared or _shared[key][0].closed:
            _shared[key] = (PrefixStore(path), weakref.WeakSet())
        store, users = _shared[key]
        users.add(cache)
    return store, key


def _unsound(model: torch.nn.Module) -> str | None:
    """Return why K and V of this model do not depend on tokens and weights alone."""
    if model.training and any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules()):
        return "the model is in training mode with dropout"
    return None


def _between(match: PrefixMatch, begin: int, end: int) -> PrefixMatch:
    """Return ``match`` with only the spans that say something about the tokens ``[begin, end)``."""
    return PrefixMatch(tuple(s for s in match.spans if s.start < end and s.start + s.used > begin), match.divergence)


def _page(layer: WindowLayer, row: int, columns: slice) -> Page:
    k, v = layer.keys, layer.values
    assert k is not None
    assert v is not None
    return Page(*(t[row, :, columns].to("cpu", copy=True).contiguous() for t in (k, v)))


def _begins_with(sequences: torch.Tensor, prompt: Prompt) -> bool:
    rows = sequences.shape[0]
    if rows % len(prompt.rows) or sequences.shape[1] < prompt.columns:
        return False
    repeats = rows // len(prompt.rows)
    ids = sequences[:, : prompt.columns].detach().to("cpu", torch.int64).numpy()
    return all(np.array_equal(ids[r, prompt.pads[r // repeats] :], prompt.rows[r // repeats]) for r in range(rows))


def _until_eos(ids: TokenIds, eos_ids: Iterable[int]) -> TokenIds:
    """Cut ``ids`` after the first end of sequence: what follows is filling."""
    ends = np.flatnonzero(np.isin(ids, list(eos_ids)))
    return ids[: int(ends[0]) + 1] if len(ends) else ids


def _by_tier(
    prompt: Prompt, columns: int, window: Sequence[int], needed: Sequence[PrefixMatch], restore: Restore | None
) -> MappingProxyType[str, int]:
    counts = {"window": 0, "host": 0, "disk": 0}
    for pad, held, match in zip(prompt.pads, window, needed, strict=True):
        limit = max(0, columns - pad)
        counts["window"] += min(held, limit)
        for span in match.spans:
            tokens = min(span.start + span.used, limit) - max(span.start, held)
            if restore is not None and tokens > 0:
                counts[restore.tier(span.block.key)] += tokens
    return MappingProxyType(counts)


def _report(turn: Turn, generated: Sequence[TokenIds]) -> TurnReport:
    if turn.prompt is None:
        return TurnReport(miss_reason=turn.reason, generated_tokens=sum(map(len, generated)))
    prefix = turn.prefix
    rows = []
    repeats = max(1, len(generated) // len(turn.prompt.rows))
    for r, (tokens, pad) in enumerate(zip(turn.prompt.rows, turn.prompt.pads, strict=True)):
        cached = max(0, prefix.columns - pad) if prefix else 0
        made = sum(map(len, generated[r * repeats : (r + 1) * repeats]))
        divergence = turn.matches[r].divergence if turn.matches else None
        rows.append(RowReport(len(tokens), cached, made, divergence))
    prompt_tokens, cached_tokens = sum(r.prompt_tokens for r in rows), sum(r.cached_tokens for r in rows)
    return TurnReport(
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        computed_tokens=prompt_tokens - cached_tokens,
        generated_tokens=sum(r.generated_tokens for r in rows),
        cached_by_tier=turn.cached_by_tier or MappingProxyType({"window": 0, "host": 0, "disk": 0}),
        restored_bytes=prefix.restored_bytes if prefix else 0,
        restore_seconds=turn.match_seconds + (prefix.seconds if prefix else 0.0),
        miss_reason=turn.reason,
        divergence=rows[0].divergence,
        rows=tuple(rows),
    )
