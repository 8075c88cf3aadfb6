"""Block files: valid safetensors, one block each, layers in order so that one can be read without the rest.

``__metadata__`` holds ``format``, ``codec``, ``key``, ``parent``, ``root`` and, as JSON, ``crc32`` (tensor name to
checksum of its payload), ``shapes`` and ``dtypes`` (of the tensors before encoding). Tensors: ``tokens`` (I64),
``k.0``, ``v.0``, ``k.1``, …; with the ``zstd`` codec K and V are U8 payloads.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from typing import Any

import numpy as np
import torch

from kvtier.errors import BlockError
from kvtier.geometry import Geometry, LayerGeometry
from kvtier.store import codec as codecs
from kvtier.store.base import Block, Landing, Page
from kvtier.store.chain import BlockId, TokenIds, block_key

FORMAT_VERSION = 1
_FORMAT = f"kvtier/{FORMAT_VERSION}"
_MAX_HEADER_BYTES = 64 * 2**20
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
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
            if tensor.dtype not in _DTYPE_NAMES:
                raise BlockError(f"blocks of {tensor.dtype} cannot be kept in files")
            payload = codecs.encode(tensor, codec)
            shapes[name], dtypes[name] = list(tensor.shape), _DTYPE_NAMES[tensor.dtype]
            stored = (dtypes[name], shapes[name]) if codec == "raw" else ("U8", [payload.nbytes])
            payloads.append((name, *stored, payload))
    header: dict[str, Any] = {}
    offset = 0
    checksums: dict[str, int] = {}
    for name, dtype, shape, payload in payloads:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + payload.nbytes]}
        checksums[name] = zlib.crc32(payload)
        offset += payload.nbytes
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
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(struct.pack("<Q", len(text)) + text), *(memoryview(p) for *_, p in payloads)]


class BlockFile:
    """A block file open for reading. Its header and ids are checked at once, each page when it is read.

    Raises:
        BlockError: the file cannot be read, or is not a whole block of this format.
    """

    tier = "disk"

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            self._read_header()
            self.geometry = self._read_geometry()
        except _NOT_A_HEADER as error:
            self.close()
            raise BlockError(f"{path}: {error}") from error
        except BlockError:
            self.close()
            raise

    def _read_header(self) -> None:
        self.nbytes = os.fstat(self._fd).st_size
        (header_bytes,) = struct.unpack("<Q", self._pread(0, 8).tobytes())
        if header_bytes > min(_MAX_HEADER_BYTES, self.nbytes - 8):
            raise BlockError(f"{self.path}: header is longer than the file")
        self._header = json.loads(self._pread(8, header_bytes).tobytes())
        self._data_start = 8 + header_bytes
        metadata = self._header.pop("__metadata__")
        if metadata["format"] != _FORMAT:
            raise BlockError(f"{self.path}: format {metadata['format']!r}, this version reads {_FORMAT!r}")
        self.codec = metadata["codec"]
        if self.codec not in codecs.CODECS:
            raise BlockError(f"{self.path}: unknown codec {self.codec!r}")
        end = max(entry["data_offsets"][1] for entry in self._header.values())
        if self._data_start + end != self.nbytes:
            raise BlockError(f"{self.path}: {self.nbytes} bytes where the header tells {self._data_start + end}")
        self._crc32 = json.loads(metadata["crc32"])
        self._shapes = json.loads(metadata["shapes"])
        self._dtypes = json.loads(metadata["dtypes"])
        tokens: TokenIds = self._payload("tokens").view("<i8").astype(np.int64)
        if block_key(metadata["parent"], tokens) != metadata["key"]:
            raise BlockError(f"{self.path}: its ids do not give its key")
        self.id = BlockId(metadata["key"], metadata["parent"], metadata["root"], tokens)

    def _read_geometry(self) -> Geometry:
        layers = []
        names = {f"{part}.{i}" for i in range(len(self._shapes) // 2) for part in "kv"}
        if not names == set(self._shapes) == set(self._dtypes) == set(self._header) - {"tokens"}:
            raise BlockError(f"{self.path}: its layers are not those that its header names")
        if not all(type(n) is int and n >= 0 for shape in self._shapes.values() for n in shape):
            raise BlockError(f"{self.path}: a shape is no shape")
        for i in range(len(self._shapes) // 2):
            (k_heads, k_tokens, k_dim), (v_heads, v_tokens, v_dim) = self._shapes[f"k.{i}"], self._shapes[f"v.{i}"]
            dtypes = {self._dtypes[f"k.{i}"], self._dtypes[f"v.{i}"]}
            if {k_tokens, v_tokens} != {len(self.id.tokens)} or len(dtypes) != 1:
                raise BlockError(f"{self.path}: layer {i} does not fit the block's tokens")
            layers.append(LayerGeometry(k_heads, k_dim, v_heads, v_dim, _DTYPES[dtypes.pop()]))
        return Geometry(tuple(layers))

    def _pread(self, offset: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        buffer = np.empty(size, dtype=np.uint8)
        done = 0
        while done < size:
            count = os.preadv(self._fd, [memoryview(buffer)[done:]], offset + done)
            if count == 0:
                raise BlockError(f"{self.path}: cut short at {offset + done} bytes")
            done += count
        return buffer

    def _payload(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        begin, end = self._header[name]["data_offsets"]
        if not 0 <= begin <= end <= self.nbytes:
            raise BlockError(f"{self.path}: {name} lies outside the file")
        payload = self._pread(self._data_start + begin, end - begin)
        if zlib.crc32(payload) != self._crc32[name]:
            raise BlockError(f"{self.path}: checksum of {name} differs")
        return payload

    def page(self, layer: int) -> Page:
        """Read the page of ``layer``.

        Raises:
            BlockError: it cannot be read, or its checksum differs.
        """
        dtype = self.geometry.layers[layer].dtype
        tensors = []
        try:
            for name in (f"k.{layer}", f"v.{layer}"):
                shape = tuple(self._shapes[name])
                tensors.append(codecs.decode(self._payload(name), self.codec, shape, dtype))
        except _NOT_A_HEADER as error:
            raise BlockError(f"{self.path}: {error}") from error
        return Page(*tensors)

    def land(self, layer: int, first: int, last: int, landing: Landing) -> None:
        """Put tokens ``[first, last)`` of the page of ``layer`` into ``landing``, without a copy where it can be.

        Raises:
            BlockError: as ``page``; what the landing then holds is undefined.
        """
        whole = (first, last) == (0, len(self.id.tokens))
        if not (whole and self.codec == "raw" and self._read_straight(layer, landing)):
            landing.take(self.page(layer), first, last)

    def _read_straight(self, layer: int, landing: Landing) -> bool:
        """Read K and V of ``layer`` right into ``landing``; whether that was possible.

        A page is contiguous in the file and scattered by heads in a window: one read of many pieces does both.
        """
        heads = [*landing.k_htb, *landing.v_htb]
        (begin, middle), (middle_v, end) = (self._header[f"{part}.{layer}"]["data_offsets"] for part in "kv")
        if len(heads) > _MAX_PIECES or middle != middle_v or sum(head.nbytes for head in heads) != end - begin:
            return False
        try:
            if os.preadv(self._fd, heads, self._data_start + begin) != end - begin:
                return False
        except OSError as error:
            raise BlockError(f"{self.path}: {error}") from error
        for name, heads_tb in ((f"k.{layer}", landing.k_htb), (f"v.{layer}", landing.v_htb)):
            checksum = 0
            for head_tb in heads_tb:
                checksum = zlib.crc32(head_tb, checksum)
            if checksum != self._crc32[name]:
                raise BlockError(f"{self.path}: checksum of {name} differs")
        return True

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
