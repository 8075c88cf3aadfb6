"""Real tensors over host memory whose device is PrivateUse1, made with DLPack capsules.

Source of the structure: ``dlpack.h``, version 0.8; PyTorch maps the device type ``kDLExtDev`` to PrivateUse1.

PyTorch calls the deleter of a capsule when the last tensor is gone, at any moment: also while a Python error is on its
way, in which no Python code may run. So the deleter is a function of the C library, ``sigemptyset``, which writes zeros
to where it points, up to 128 bytes: to the first words of the structure, which are looked at later.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

_EXTENSION_DEVICE = 12  # kDLExtDev
_BYTES = 1 | 8 << 8 | 1 << 16  # kDLUInt, 8 bits, one lane
_SLOTS = 2**16
_WORDS = 16  # data, device, dimensions and type, shape, strides, offset, context, deleter; shape and strides; free
_DELETER: Any = ctypes.cast(ctypes.CDLL(None).sigemptyset, ctypes.c_void_p).value

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Capsules:
    """Tensors of bytes on the device, and which of them are gone. Not for several threads at once."""

    def __init__(self) -> None:
        self._words = np.zeros((_SLOTS, _WORDS), np.int64)
        self._expected = np.zeros(_SLOTS, np.int64)  # of the first word, while the tensor lives
        self._used = 0
        self._free: list[int] = []
        self._at = self._words.ctypes.data
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._words))  # tensors may outlive the interpreter

    def bytes_at(self, address: int, nbytes: int) -> torch.Tensor:
        """Return a tensor ``[nbytes]`` at ``address``, on the first device of PrivateUse1.

        Raises:
            MemoryError: more than 65,536 tensors with memory of their own are alive.
        """
        if not self._free and self._used == _SLOTS:
            raise MemoryError("the test device has no room for another tensor")
        if self._free:
            slot = self._free.pop()
        else:
            slot, self._used = self._used, self._used + 1
        at = self._at + slot * _WORDS * 8
        sizes = (at + 8 * 8, at + 9 * 8)  # of 8 bytes each
        self._words[slot, :10] = (address, _EXTENSION_DEVICE, 1 | _BYTES << 32, *sizes, 0, 0, _DELETER, nbytes, 1)
        self._expected[slot] = address
        return torch.utils.dlpack.from_dlpack(_new_capsule(at, b"dltensor", None))

    def gone(self) -> list[int]:
        """Return the addresses of the tensors that are gone since the last call."""
        slots = np.flatnonzero(self._words[: self._used, 0] != self._expected[: self._used])
        addresses: list[int] = self._expected[slots].tolist()
        self._expected[slots] = self._words[slots, 0]
        self._free += slots.tolist()
        return addresses
