"""Block files: valid safetensors, one block each, layers in order so that one can be read without the rest.

``__metadata__`` holds ``format``, ``codec``, ``key``, ``parent``, ``root`` and, as JSON, ``crc32`` (tensor name to
checksum of its payload), ``shapes`` and ``dtypes`` (of the tensors before encoding). Tensors: ``tokens`` (I64),
``k.0``, ``v.0``, ``k.1``, …; with the ``zstd`` codec K and V are U8 payloads.
"""

from __future__ import annotations

import functools
import json
import os
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.errors import BlockError
from kvtier.geometry import Geometry, LayerGeometry
from kvtier.headers import DTYPE_NAMES, DTYPES, encode_header
from kvtier.pages import Landing, Page
from kvtier.store import codec as codecs
from kvtier.store.base import Block
from kvtier.store.chain import BlockId, TokenIds, block_key

FORMAT_VERSION = 1
_FORMAT = f"kvtier/{FORMAT_VERSION}"
_MAX_HEADER_BYTES = 64 * 2**20
_MAX_PIECES = 1024  # that one system call reads into (IOV_MAX of Linux and macOS)
# What reading a damaged header runs into.
_NOT_A_HEADER = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


def encode_block(block: Block, codec: str) -> list[memoryview]:
    """Return the bytes of a block file in pieces, header first.

    Raises:
        BlockError: files have no name for the dtype of a page.
    """
    payloads: list[tuple[str, str, list[int], np.ndarray[Any, np.dtype[np.uint8]]]] = []
    tokens = np.ascontiguousarray(block.id.tokens, dtype="<i8")
    payloads.append(("tokens", "I64", [len(tokens)], tokens.view(np.uint8)))
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    for layer, page in enumerate(block.pages):
        for name, tensor in ((f"k.{layer}", page.k_htd), (f"v.{layer}", page.v_htd)):
            if tensor.dtype not in DTYPE_NAMES:
                raise BlockError(f"blocks of {tensor.dtype} cannot be kept in files")
            payload = codecs.encode(tensor, codec)
            shapes[name], dtypes[name] = list(tensor.shape), DTYPE_NAMES[tensor.dtype]
            stored = (dtypes[name], shapes[name]) if codec == "raw" else ("U8", [payload.nbytes])
            payloads.append((name, *stored, payload))
    checksums = {name: zlib.crc32(payload) for name, *_, payload in payloads}
    metadata = {
        "format": _FORMAT,
        "codec": codec,
        "key": block.id.key,
        "parent": block.id.parent,
        "root": block.id.root,
        "crc32": json.dumps(checksums),
        "shapes": json.dumps(shapes),
        "dtypes": json.dumps(dtypes),
    }
    header = encode_header([(name, dtype, shape, data.nbytes) for name, dtype, shape, data in payloads], metadata)
    return [memoryview(header), *(memoryview(p) for *_, p in payloads)]


@dataclass(frozen=True, slots=True)
class _Layers:
    """What the headers of all blocks of one model and length say alike."""

    geometry: Geometry
    tokens: frozenset[int]


@functools.lru_cache(maxsize=64)
def _read_geometry(shapes_text: str, dtypes_text: str) -> tuple[_Layers, tuple[str, ...]]:
    """Return the layers that a header tells, and the names of its tensors in the order of ``_k`` and ``_v``.

    Raises:
        BlockError: it contradicts itself.
    """
    shapes, dtypes = json.loads(shapes_text), json.loads(dtypes_text)
    names = tuple(f"{part}.{i}" for i in range(len(shapes) // 2) for part in "kv")
    if not set(names) == set(shapes) == set(dtypes):
        raise BlockError("shapes and dtypes are not those of the same layers")
    if not all(type(n) is int and n >= 0 for shape in shapes.values() for n in shape):
        raise BlockError("a shape is no shape")
    layers, tokens = [], set()
    for i in range(len(shapes) // 2):
        (k_heads, k_tokens, k_dim), (v_heads, v_tokens, v_dim) = shapes[f"k.{i}"], shapes[f"v.{i}"]
        dtype, v_dtype = dtypes[f"k.{i}"], dtypes[f"v.{i}"]
        if dtype != v_dtype:
            raise BlockError(f"K and V of layer {i} differ in type")
        layers.append(LayerGeometry(k_heads, k_dim, v_heads, v_dim, DTYPES[dtype]))
        tokens |= {k_tokens, v_tokens}
    return _Layers(Geometry(tuple(layers)), frozenset(tokens)), ("tokens", *names)


# Where tensors stand in the order of a header's names.
_TOKENS = 0


def _k(layer: int) -> int:
    return 1 + 2 * layer


def _v(layer: int) -> int:
    return 2 + 2 * layer


class BlockFile:
    """A block file open for reading. Its header and ids are checked at once, each page when it is read.

    Args:
        path: where it lies.
        fd: a descriptor that is open already; it is closed with the file, and when this raises.

    Raises:
        BlockError: the file cannot be read, or is not a whole block of this format.
    """

    tier = "disk"

    def __init__(self, path: str, fd: int | None = None) -> None:
        self.path = path
        self._fd = -1 if fd is None else fd
        try:
            if fd is None:
                self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            self._read_header()
        except _NOT_A_HEADER as error:
            self.close()
            raise BlockError(f"{path}: {error}") from error
        except BlockError:
            self.close()
            raise

    def _read_header(self) -> None:
        # What is kept of a header are numbers in flat lists. The objects of a parsed one, kept for each file of a long
        # prompt, are so many that they set off a full garbage collection, which takes longer than all reading.
        self.nbytes = os.fstat(self._fd).st_size
        (header_bytes,) = struct.unpack("<Q", self._pread(0, 8).tobytes())
        if header_bytes > min(_MAX_HEADER_BYTES, self.nbytes - 8):
            raise BlockError(f"{self.path}: header is longer than the file")
        header = json.loads(self._pread(8, header_bytes).tobytes())
        self._data_start = 8 + header_bytes
        metadata = header.pop("__metadata__")
        if metadata["format"] != _FORMAT:
            raise BlockError(f"{self.path}: format {metadata['format']!r}, this version reads {_FORMAT!r}")
        self.codec = metadata["codec"]
        if self.codec not in codecs.CODECS:
            raise BlockError(f"{self.path}: unknown codec {self.codec!r}")
        end = max(entry["data_offsets"][1] for entry in header.values())
        if self._data_start + end != self.nbytes:
            raise BlockError(f"{self.path}: {self.nbytes} bytes where the header tells {self._data_start + end}")
        layers, names = _read_geometry(metadata["shapes"], metadata["dtypes"])
        if set(names) != set(header):
            raise BlockError(f"{self.path}: its layers are not those that its header names")
        checksums = json.loads(metadata["crc32"])
        self._begins = [header[name]["data_offsets"][0] for name in names]
        self._ends = [header[name]["data_offsets"][1] for name in names]
        self._crc32 = [checksums[name] for name in names]
        tokens: TokenIds = self._payload(_TOKENS).view("<i8").astype(np.int64)
        if block_key(metadata["parent"], tokens) != metadata["key"]:
            raise BlockError(f"{self.path}: its ids do not give its key")
        if layers.tokens != {len(tokens)}:
            raise BlockError(f"{self.path}: a layer does not fit the block's tokens")
        self.geometry = layers.geometry
        self.id = BlockId(metadata["key"], metadata["parent"], metadata["root"], tokens)

    def _pread(self, offset: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        buffer = np.empty(size, dtype=np.uint8)
        done = 0
        while done < size:
            count = os.preadv(self._fd, [memoryview(buffer)[done:]], offset + done)
            if count == 0:
                raise BlockError(f"{self.path}: cut short at {offset + done} bytes")
            done += count
        return buffer

    def _payload(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        begin, end = self._begins[index], self._ends[index]
        if not 0 <= begin <= end <= self.nbytes:
            raise BlockError(f"{self.path}: tensor {index} lies outside the file")
        payload = self._pread(self._data_start + begin, end - begin)
        if zlib.crc32(payload) != self._crc32[index]:
            raise BlockError(f"{self.path}: checksum of tensor {index} differs")
        return payload

    def page(self, layer: int) -> Page:
        """Read the page of ``layer``.

        Raises:
            BlockError: it cannot be read, or its checksum differs.
        """
        g, tokens = self.geometry.layers[layer], len(self.id.tokens)
        try:
            k = codecs.decode(self._payload(_k(layer)), self.codec, (g.k_heads, tokens, g.k_dim), g.dtype)
            v = codecs.decode(self._payload(_v(layer)), self.codec, (g.v_heads, tokens, g.v_dim), g.dtype)
        except _NOT_A_HEADER as error:
            raise BlockError(f"{self.path}: {error}") from error
        return Page(k, v)

    @property
    def is_plain(self) -> bool:
        """Whether pages are stored as they are."""
        return bool(self.codec == "raw")

    def land(self, layer: int, first: int, last: int, landing: Landing, *, check: bool = True) -> None:
        """Put tokens ``[first, last)`` of the page of ``layer`` into ``landing``, without a copy where it can be.

        Without ``check``, a checksum is only looked at where the page must be read as a whole.

        Raises:
            BlockError: as ``page``; what the landing then holds is undefined.
        """
        whole = (first, last) == (0, len(self.id.tokens))
        if not (whole and self.codec == "raw" and self._read_straight(layer, landing, check)):
            landing.take(self.page(layer), first, last)

    def _read_straight(self, layer: int, landing: Landing, check: bool) -> bool:
        """Read K and V of ``layer`` right into ``landing``; whether that was possible.

        A page is contiguous in the file and scattered by heads in a window: one read of many pieces does both.
        """
        heads = [*landing.k_htb, *landing.v_htb]
        begin, end = self._begins[_k(layer)], self._ends[_v(layer)]
        adjacent = self._ends[_k(layer)] == self._begins[_v(layer)]
        if len(heads) > _MAX_PIECES or not adjacent or sum(head.nbytes for head in heads) != end - begin:
            return False
        try:
            if os.preadv(self._fd, heads, self._data_start + begin) != end - begin:
                return False
        except OSError as error:
            raise BlockError(f"{self.path}: {error}") from error
        if not check:
            return True
        for index, heads_tb in ((_k(layer), landing.k_htb), (_v(layer), landing.v_htb)):
            checksum = 0
            for head_tb in heads_tb:
                checksum = zlib.crc32(head_tb, checksum)
            if checksum != self._crc32[index]:
                raise BlockError(f"{self.path}: checksum of tensor {index} differs")
        return True

    def check(self) -> None:
        """Read every byte once.

        Raises:
            BlockError: a checksum differs.
        """
        for index in range(len(self._begins)):
            try:
                self._payload(index)
            except OSError as error:
                raise BlockError(f"{self.path}: {error}") from error

    def detach(self) -> None:
        """Nothing is held in memory for it."""

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
