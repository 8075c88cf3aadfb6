"""DeviceMemory: the layers of one compute device, which of them are cold, and the budget that they share."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from kvtier.errors import BudgetError
from kvtier.kv.room import with_slack
from kvtier.kv.spec import LayerSpec
from kvtier.offload.accounting import (
    PREFETCH_DEPTH,
    MemoryBudget,
    TransferStats,
    cold_order,
    round_up,
    smallest_budget_bytes,
)
from kvtier.offload.placement import PagePlacement
from kvtier.offload.prefetch import ColdLayer, PrefetchRing
from kvtier.transfer.base import CopyEngine


class BudgetedLayer(ColdLayer, Protocol):
    """The interface of a layer to the memory of a device.

    Attributes:
        spec: spec of its K and V.
        may_be_cold: whether it may turn cold.
        wants: columns that its last update needed room for.
    """

    spec: LayerSpec
    may_be_cold: bool
    wants: int

    @property
    def rows(self) -> int:
        """Sequences held."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one column of all rows."""

    @property
    def device_bytes(self) -> int:
        """Device bytes that the layer owns."""

    def turn_cold(self) -> None:
        """Move the full pages to lower tiers, and drop the buffer."""


class DeviceMemory:
    """One compute device. Buffers, tail pages and slots stay inside its budget at all times.

    Layers turn cold when the budget would be exceeded, in an order that spreads them evenly, and stay cold.

    Attributes:
        expected_columns: columns of this turn's prompt.
        final_columns: columns of the prompt and its longest answer, for error messages.

    Args:
        device: the device on which attention reads.
        engine: moves bytes to and from it.
        ledger: counts its bytes.
        limit: returns the current budget in bytes; None for no limit. Called before memory is taken.
        placement: places cold pages.
        transfers: counts pages and waits.
        page_tokens: tokens of a page.
        total_layers: returns how many layers the model has.
        layers_elsewhere: returns how many of them are on other devices, as far as they have been seen.
    """

    def __init__(
        self,
        device: torch.device,
        engine: CopyEngine,
        ledger: MemoryBudget,
        limit: Callable[[], int | None],
        placement: PagePlacement,
        transfers: TransferStats,
        page_tokens: int,
        total_layers: Callable[[], int],
        layers_elsewhere: Callable[[], int] = int,
    ) -> None:
        self.device = device
        self.engine = engine
        self.placement = placement
        self.page_tokens = page_tokens
        self.ledger = ledger
        self.ring = PrefetchRing(engine, device, ledger, transfers, self.make_room, self._in_order)
        self.expected_columns = 0
        self.final_columns = 0
        self._limit = limit
        self._total_layers = total_layers
        self._layers_elsewhere = layers_elsewhere
        self._layers: dict[int, BudgetedLayer] = {}
        self._sorted: list[int] = []
        self._cold: set[int] = set()  # layers that are, or are to be, cold

    def _in_order(self) -> Sequence[BudgetedLayer]:
        return [self._layers[index] for index in self._sorted]

    @property
    def layer_count(self) -> int:
        """How many layers the device has."""
        return len(self._layers)

    @property
    def cold_layers(self) -> int:
        """How many layers are cold."""
        return sum(layer.is_cold for layer in self._layers.values())

    @property
    def hot_layers(self) -> int:
        """How many layers are hot."""
        return self.layer_count - self.cold_layers

    def join(self, layer: BudgetedLayer) -> None:
        """Add a new layer.

        Raises:
            BudgetError: there is no room even for one page of it.
        """
        self.make_room(layer.token_bytes * self.page_tokens, keep=layer)
        self._layers[layer.index] = layer
        if layer.index not in self._sorted:
            bisect.insort(self._sorted, layer.index)
        self.count(layer)

    def leave(self, layer: BudgetedLayer) -> None:
        """Remove a layer."""
        self.ledger.set(id(layer), 0)
        if self._layers.get(layer.index) is layer:
            del self._layers[layer.index]
            self._sorted.remove(layer.index)
        if not self._layers:  # prefetched pages and choices of cold layers mean nothing to later layers
            self.ring.close()
            self._cold.clear()

    def count(self, layer: BudgetedLayer, more: int = 0) -> None:
        """Note the bytes that ``layer`` holds now, and ``more`` bytes that it is about to take."""
        self.ledger.set(id(layer), layer.device_bytes + more)

    def step(self, layer: BudgetedLayer) -> None:
        """Begin the update of ``layer``: attention of the layers before it has been enqueued.

        This does not hold for a layer that must stay hot: an indexer's keys may come after the K and V of its own
        layer, before attention reads them.
        """
        if not layer.may_be_cold:
            return
        self.ring.release()
        if not layer.is_cold:
            self.ring.prefetch(layer.index)

    def foresee(self, token_bytes: Mapping[int, int], rows: int, columns: Mapping[int, int]) -> None:
        """Choose the cold layers before any layer is filled.

        Args:
            token_bytes: bytes of K and V of one token, by layer.
            rows: sequences.
            columns: columns that each layer will hold.
        """
        limit = self._refresh()
        if limit is None:
            return
        room = {index: with_slack(n + 1) for index, n in columns.items()}
        pages = {index: round_up(n + 1, self.page_tokens) for index, n in columns.items()}
        tails = sum(token_bytes.values()) * rows * self.page_tokens
        for index in (None, *cold_order(self._total_layers())):
            if index is not None:
                self._cold.add(index)
            hot = sum(n * room[i] for i, n in token_bytes.items() if i not in self._cold) * rows
            largest = max((n * pages[i] for i, n in token_bytes.items() if i in self._cold), default=0)
            ring = PREFETCH_DEPTH * largest * rows
            growth = max((n * room[i] for i, n in token_bytes.items() if i not in self._cold), default=0) * rows
            if hot + growth + ring + tails <= limit:
                return

    def keep_hot(self, layer: BudgetedLayer, nbytes: int) -> bool:
        """Make room for ``nbytes`` more of ``layer``; return False if the layer has to turn cold instead.

        Raises:
            BudgetError: the layer must stay hot, and there is no room.
        """
        if not layer.may_be_cold:
            self.make_room(nbytes, keep=layer)
            return True
        self._refresh()
        while layer.index not in self._cold and not self.ledger.fits(nbytes):
            self._turn_one_cold(but=layer)
        return layer.index not in self._cold

    def make_room(self, nbytes: int, keep: BudgetedLayer | None = None) -> None:
        """Turn layers cold until ``nbytes`` more fit.

        Raises:
            BudgetError: they would not fit with all layers cold; then no layer turns cold.
        """
        limit = self._refresh()
        if limit is None or self.ledger.fits(nbytes):
            return
        hot = [layer for layer in self._layers.values() if layer.may_be_cold and layer is not keep]
        freed = sum(layer.device_bytes - layer.token_bytes * self.page_tokens for layer in hot if not layer.is_cold)
        if self.ledger.used_bytes - freed + nbytes > limit:
            raise self._too_small(limit, keep)
        while not self.ledger.fits(nbytes):
            self._turn_one_cold(but=keep)

    def _turn_one_cold(self, but: BudgetedLayer | None) -> None:
        """Choose the next cold layer; turn it cold if it exists and is not ``but``, which turns cold by itself."""
        for index in (*cold_order(self._total_layers()), *self._sorted):
            layer = self._layers.get(index)
            if index not in self._cold and (layer is None or layer.may_be_cold):
                self._cold.add(index)
                break
        else:
            hot = [one for one in self._in_order() if one.may_be_cold and not one.is_cold and one is not but]
            layer = hot[0] if hot else None
            if layer is None:
                raise self._too_small(self.ledger.limit_bytes or 0, but)
        if layer is not None and layer is not but and not layer.is_cold:
            layer.turn_cold()

    def _refresh(self) -> int | None:
        self.ledger.limit_bytes = self._limit()
        return self.ledger.limit_bytes

    def _too_small(self, limit: int, growing: BudgetedLayer | None) -> BudgetError:
        layers = {**self._layers, **({growing.index: growing} if growing is not None else {})}
        rows = max(layer.rows for layer in layers.values())
        columns = max(self.final_columns, self.expected_columns, *(layer.wants for layer in layers.values()))
        movable = [layer.spec.token_bytes for layer in layers.values() if layer.may_be_cold]
        fixed = [layer for layer in layers.values() if not layer.may_be_cold]
        # Layers that have not been seen on any device yet count as the largest seen here so far.
        movable += [max(movable, default=0)] * (self._total_layers() - len(layers) - self._layers_elsewhere())
        hot = sum(layer.token_bytes * 2 * round_up(columns + 1, self.page_tokens) for layer in fixed)
        smallest = smallest_budget_bytes(movable, rows, columns, self.page_tokens, hot)
        return BudgetError(
            f"device_budget={limit} bytes is too small for {rows} × {columns} tokens on {self.device}, even with every "
            f"layer cold: the prefetch ring and one page per layer need {smallest} bytes. Pass at least that many, or "
            "shorten the context."
        )

    def close(self) -> None:
        """Close the ring and the engine."""
        self.ring.close()
        self.engine.close()
