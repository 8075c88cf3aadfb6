"""Real tensors over host memory whose device is PrivateUse1, made with DLPack capsules.

Source of the structures: ``dlpack.h``, version 0.8; PyTorch maps the device type ``kDLExtDev`` to PrivateUse1.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable
from typing import Any

import torch

_EXTENSION_DEVICE = 12  # kDLExtDev
_UNSIGNED = 1  # kDLUInt
_Deleter: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

_live: dict[int, tuple[_Managed, Any, Callable[[], None]]] = {}  # by the address of the structure


def _delete(address: int) -> None:
    _, _, freed = _live.pop(address)
    freed()


_deleter = _Deleter(_delete)


@atexit.register
def _forget() -> None:
    """Let tensors that outlive the interpreter be freed without a call into it; their structures stay."""
    for managed, _, _ in _live.values():
        managed.deleter = _Deleter(0)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(managed))


def bytes_at(address: int, nbytes: int, freed: Callable[[], None]) -> torch.Tensor:
    """Return a tensor of ``nbytes`` bytes at ``address``, on the first device of PrivateUse1.

    Args:
        address: host memory that stays valid until ``freed`` is called.
        nbytes: its size.
        freed: called once no tensor uses the memory any more, on any thread, perhaps during garbage collection.
    """
    shape, strides = (ctypes.c_int64 * 1)(nbytes), (ctypes.c_int64 * 1)(1)
    tensor = _Tensor(address, _Device(_EXTENSION_DEVICE, 0), 1, _DataType(_UNSIGNED, 8, 1), shape, strides, 0)
    managed = _Managed(tensor, None, _deleter)
    key = ctypes.addressof(managed)
    _live[key] = (managed, (shape, strides), freed)
    return torch.utils.dlpack.from_dlpack(_new_capsule(key, b"dltensor", None))
