"""OffloadManager: the layers of one cache under a budget, on all devices that they live on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvtier.kv.codecs import Codec
from kvtier.kv.spec import LayerSpec
from kvtier.kv.window import Window
from kvtier.offload.accounting import MemoryBudget, TransferStats
from kvtier.offload.device import DeviceMemory
from kvtier.offload.layer import OffloadedLayer
from kvtier.offload.placement import PagePlacement
from kvtier.offload.storage.spill_folder import SpillFolder
from kvtier.platform.filesystem import user_cache_folder
from kvtier.platform.memory import free_device_bytes
from kvtier.report import TurnReport
from kvtier.transfer.engines import MakeEngine

AUTO = "auto"


class OffloadManager:
    """Cold and hot layers of one cache, on all devices of its layers.

    Owns engines, host memory and page files; ``close`` releases them.

    Args:
        device_budget: bytes on each device, ``"auto"`` for its free bytes less a reserve, None for no limit.
        host_budget_bytes: bytes of host memory for cold pages, of all devices together; None for no limit.
        spill_folder: parent folder of page files.
        page_tokens: tokens of a page.
        total_layers: returns how many layers the model has.
        make_engine: returns the engine of a device.
        page_codec: encodes cold pages; None to keep them raw.
    """

    def __init__(
        self,
        device_budget: int | str | None,
        host_budget_bytes: int | None,
        spill_folder: Path,
        page_tokens: int,
        total_layers: Callable[[], int],
        make_engine: MakeEngine,
        page_codec: Codec | None = None,
    ) -> None:
        self.transfers = TransferStats()
        self._before = TransferStats()
        self._columns = self._final_columns = 0
        self.host = MemoryBudget(host_budget_bytes)
        self._device_budget = device_budget
        self._folder = SpillFolder(spill_folder)
        self._kept: list[SpillFolder] = [self._folder]
        self.page_tokens = page_tokens
        self._total_layers = total_layers
        self._make_engine = make_engine
        self._page_codec = page_codec
        self._device_memories: dict[torch.device, DeviceMemory] = {}

    def device_memory(self, device: torch.device) -> DeviceMemory:
        """Return the memory of ``device``, made on first use."""
        device_memory = self._device_memories.get(device)
        if device_memory is None:
            engine = self._make_engine(device)
            ledger = MemoryBudget(None)
            placement = PagePlacement(
                engine,
                self.host,
                self._folder,
                self.transfers,
                self.page_tokens,
                self._page_codec,
                _devices_like(device),
            )
            device_memory = self._device_memories[device] = DeviceMemory(
                device,
                engine,
                ledger,
                lambda: self._limit(device, ledger),
                placement,
                self.transfers,
                self.page_tokens,
                self._total_layers,
                lambda: sum(other.layer_count for place, other in self._device_memories.items() if place != device),
            )
            device_memory.expected_columns, device_memory.final_columns = self._columns, self._final_columns
        return device_memory

    def _limit(self, device: torch.device, ledger: MemoryBudget) -> int | None:
        if isinstance(self._device_budget, str):
            return ledger.used_bytes + free_device_bytes(device)
        return self._device_budget

    def layer(
        self, index: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, window: Window | None, may_be_cold: bool
    ) -> OffloadedLayer:
        """Return an empty layer for K and V like these.

        Raises:
            BudgetError: there is no room even for one page of it.
        """
        return OffloadedLayer(
            self.device_memory(k_bhtd.device),
            index,
            k_bhtd.shape[0],
            LayerSpec.of(k_bhtd, v_bhtd),
            window=window,
            may_be_cold=may_be_cold,
        )

    def keep_files_of(self, other: OffloadManager) -> None:
        """Keep the files of ``other`` until this manager is closed, since the two share pages."""
        self._kept.extend(folder.share() for folder in other._kept)

    def begin_turn(self, columns: int, new_columns: int = 0) -> None:
        """Restart the counts, for a prompt of ``columns`` columns and at most ``new_columns`` after it."""
        self._columns, self._final_columns = columns, columns + new_columns
        for device_memory in self._device_memories.values():
            device_memory.expected_columns, device_memory.final_columns = columns, columns + new_columns
        self._before = self.transfers.copy()
        for ledger in (self.host, *(device_memory.ledger for device_memory in self._device_memories.values())):
            ledger.begin_peak()

    def account(self, report: TurnReport) -> TurnReport:
        """Return ``report`` with the offload counts of the turn."""
        counts = self.transfers.since(self._before)
        device_memories = self._device_memories.values()
        return replace(
            report,
            hot_layers=sum(device_memory.hot_layers for device_memory in device_memories),
            cold_layers=sum(device_memory.cold_layers for device_memory in device_memories),
            bytes_down=counts.bytes_down,
            bytes_up=counts.bytes_up,
            waits=counts.waits,
            wait_seconds=counts.wait_seconds,
            peak_device_bytes=max((device_memory.ledger.peak_bytes for device_memory in device_memories), default=0),
            peak_host_bytes=self.host.peak_bytes,
        )

    @property
    def device_memories(self) -> Sequence[DeviceMemory]:
        """The memory of each device that the cache uses."""
        return tuple(self._device_memories.values())

    def close(self) -> None:
        """Release threads, streams, host memory and page files. May be called more than once."""
        for device_memory in self._device_memories.values():
            device_memory.close()
        self._device_memories.clear()
        while self._kept:
            self._kept.pop().close()


def _devices_like(device: torch.device) -> int:
    """Return how many devices of this type may share the host budget."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.accelerator.device_count() if accelerator is not None and accelerator.type == device.type else 1


def default_spill_folder(store_folder: Path | None) -> Path:
    """Return the default folder of page files: beside the blocks of the store, else in the user's cache folder.

    Raises:
        ConfigurationError: the user has no cache folder.
    """
    if store_folder is not None:
        return store_folder / "spill"
    return user_cache_folder("spill_dir") / "kvtier" / "spill"
