"""OffloadConfig: the budgets of a cache, read once."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from kvtier.errors import ConfigurationError
from kvtier.kv.codecs import Codec, Raw, chosen_codec
from kvtier.offload.manager import AUTO, OffloadManager, default_spill_folder
from kvtier.platform.filesystem import folder_path
from kvtier.platform.memory import host_memory_bytes
from kvtier.store import PrefixStore
from kvtier.transfer.engines import MakeEngine
from kvtier.units import parse_bytes


class OffloadConfig:
    """The offload arguments of a cache: budgets, spill folder, codec of cold pages and copy engine.

    Raises:
        ConfigurationError: a budget is not a byte count, ``spill_dir`` is not a path, or ``page_compression`` no codec.
    """

    def __init__(
        self,
        device_budget: int | str | None,
        host_budget: int | str | None,
        spill_dir: str | os.PathLike[str] | None,
        page_compression: str | Codec,
        engine: MakeEngine,
    ) -> None:
        self.arguments: dict[str, Any] = {
            "device_budget": device_budget,
            "host_budget": host_budget,
            "spill_dir": spill_dir,
            "page_compression": page_compression,
            "engine": engine,
        }
        if device_budget is not None and device_budget != AUTO:
            of_device = f'"{AUTO}" for the free memory of the device less a reserve'
            device_budget = parse_bytes(device_budget, "device_budget", of_device)
        self._device_budget = device_budget
        self._host_budget_bytes = None if host_budget is None else parse_bytes(host_budget, "host_budget")
        self._spill = folder_path(spill_dir, "spill_dir") if spill_dir is not None else None
        if self._spill is not None and self._spill.exists() and not self._spill.is_dir():
            raise ConfigurationError(f"spill_dir={str(spill_dir)!r} is a file; pass a folder for pages of cold layers.")
        codec = chosen_codec(page_compression, "page_compression")
        self._page_codec = None if codec.name == Raw.name else codec
        self._engine = engine

    @property
    def lossy_codec(self) -> str | None:
        """Name of the codec of cold pages if there is one and it is lossy: it is part of every root, as the store's."""
        codec = self._page_codec
        return None if codec is None or codec.is_lossless or self._device_budget is None else codec.name

    def open(self, store: PrefixStore, total_layers: Callable[[], int]) -> OffloadManager | None:
        """Return the offload manager of a cache over ``store``; None without a ``device_budget``."""
        if self._device_budget is None:
            return None
        return OffloadManager(
            self._device_budget,
            host_memory_bytes() // 2 if self._host_budget_bytes is None else self._host_budget_bytes,
            self._spill or default_spill_folder(store.path),
            store.block_size,
            total_layers,
            self._engine,
            self._page_codec,
        )
