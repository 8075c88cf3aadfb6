"""Counts the bytes of tensors on a device without memory, ``meta``: held now, and at most."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountedMemory(TorchDispatchMode):
    """Inside of it, every storage on ``meta`` counts from the operation that makes it until its last tensor is gone.

    Attributes:
        held: bytes of the storages that live now.
        peak: the most bytes at the end of any operation.
    """

    def __init__(self):
        super().__init__()
        self._storages: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                self._storages[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.held)
        return result

    @property
    def held(self):
        self._storages = {ref: nbytes for ref, nbytes in self._storages.items() if not ref.expired()}
        return sum(self._storages.values())
