"""Where cold pages go: host memory while its budget lasts, then files."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtier.kv.spec import LayerSpec
from kvtier.offload.accounting import MemoryBudget, TransferStats
from kvtier.offload.extents import FileExtent, HostExtent, Part
from kvtier.offload.host_memory import HostPool
from kvtier.offload.page_file import PageFile
from kvtier.offload.spill_folder import SpillFolder
from kvtier.offload.staging import StagingBuffer
from kvtier.transfer import CopyEngine, Fence


class PagePlacement:
    """The tiers below one compute device.

    Where kernels read host memory, host memory is the device's own tier, and there are only files below.

    Args:
        engine: moves the bytes.
        host: the budget of host memory, which all devices share.
        folder: for files.
        traffic: counts the bytes.
        page_tokens: tokens of a page.
        devices: how many devices may share ``host``: the staging memory of each is left free.
    """

    def __init__(
        self,
        engine: CopyEngine,
        host: MemoryBudget,
        folder: SpillFolder,
        traffic: TransferStats,
        page_tokens: int,
        devices: int = 1,
    ) -> None:
        self.page_tokens = page_tokens
        self._engine = engine
        self._host = host
        self._folder = folder
        self._traffic = traffic
        self._slabs = None if engine.device_is_host else HostPool(engine.host_empty, host)
        self.staging = StagingBuffer(self._slabs, host.limit_bytes, devices) if self._slabs is not None else None

    def lower(
        self, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, after: Sequence[Fence]
    ) -> tuple[list[Part], list[Fence]]:
        """Let full pages go down, once ``after`` has passed.

        Returns:
            Where they are, and the fences after which ``k_bhtd`` and ``v_bhtd`` may be overwritten.

        Raises:
            StreamError: there is no place for files.
            BudgetError: host memory does not even hold what files need to reach the device.
        """
        rows, tokens = k_bhtd.shape[0], k_bhtd.shape[2]
        geometry = LayerSpec.of(k_bhtd, v_bhtd)
        parts: list[Part] = []
        fences: list[Fence] = []
        begin = 0
        while begin < tokens:
            run: HostExtent | FileExtent | None = None
            count = tokens - begin
            while run is None and count:  # as many pages as host memory has room for
                run = self._host_run(rows, count, geometry)
                if run is None:
                    count = count // 2 // self.page_tokens * self.page_tokens
            if run is None:
                count = tokens - begin
                run = FileExtent(self._engine, self.staging, PageFile(self._folder, rows, count, geometry))
            end = begin + count
            fences += run.fill(k_bhtd[:, :, begin:end], v_bhtd[:, :, begin:end], after)
            parts.append(Part(run, 0, count, tuple(range(rows))))
            begin = end
        self._traffic.bytes_down += rows * tokens * geometry.token_bytes
        return parts, fences

    def has_host_room(self, nbytes: int) -> bool:
        """Whether host memory has room for ``nbytes`` more, and for what files need."""
        return self.staging is not None and self._host.fits(nbytes + self.staging.reserve_bytes)

    def _host_run(self, rows: int, tokens: int, geometry: LayerSpec) -> HostExtent | None:
        if self._slabs is None or self.staging is None:
            return None
        piece = self._slabs.take(rows * tokens * geometry.token_bytes, leave=self.staging.reserve_bytes)
        return None if piece is None else HostExtent(self._engine, self._slabs, piece, rows, tokens, geometry)
