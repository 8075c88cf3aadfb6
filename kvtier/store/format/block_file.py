"""Block files: valid safetensors, one block each, layers in order so that one can be read without the rest.

``__metadata__`` holds ``format``, ``codec``, ``key``, ``parent``, ``root`` and, as JSON, ``crc32`` (tensor name to
checksum of its payload), ``shapes`` and ``dtypes`` (of the tensors before encoding). Tensors: ``tokens`` (I64),
``k.0``, ``v.0``, ``k.1``, …; with any codec but ``raw``, K and V are U8 payloads. A checkpoint ends with ``states``
(U8), which are never encoded.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtier.errors import BlockError, UnavailableError
from kvtier.kv.codecs import BUILT_IN, Codec, Raw
from kvtier.kv.codecs.base import as_bytes, as_tensor, is_name
from kvtier.kv.page import Bytes, Page, PageView
from kvtier.kv.safetensors_header import dtype_name, encode_header
from kvtier.kv.spec import KVSpec
from kvtier.platform.descriptors import ReadFile
from kvtier.platform.filesystem import READ_FLAGS
from kvtier.store.block import Block, Landing
from kvtier.store.chain import BlockId, BlockKind, TokenIds
from kvtier.store.format.header import (
    MAX_LAYERS,
    NOT_JSON,
    STATES,
    check_hash,
    check_ids,
    check_layers,
    fill,
    json_object,
    open_header,
    read_checksums,
    spec_of,
    tensor_names,
)

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
_FORMAT = f"kvtier/{FORMAT_VERSION}"
_VERSIONED = re.compile(r"kvtier/[0-9]{1,9}")
_MAX_PIECES = 1024  # that one system call reads into (IOV_MAX of Linux and macOS)
_METADATA = ("format", "codec", "key", "parent", "root", "crc32", "shapes", "dtypes")
_Shapes = tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]


def encode_block(block: Block, codec: Codec = BUILT_IN[Raw.name]) -> list[memoryview]:
    """Return the bytes of a block file in pieces, header first.

    Raises:
        BlockError: files have no name for the dtype of a page, or could not be read again: there are too many layers or
            tokens, or negative ids.
    """
    try:
        check_ids(block.id.tokens)
    except ValueError as error:
        raise BlockError(f"a block of these tokens cannot be kept in a file: {error}") from error
    if len(block.pages) > MAX_LAYERS:
        raise BlockError(f"blocks of {len(block.pages)} layers cannot be kept in files, only of up to {MAX_LAYERS}")
    payloads: list[tuple[str, str, list[int], np.ndarray[Any, np.dtype[np.uint8]]]] = []
    tokens = np.ascontiguousarray(block.id.tokens, dtype="<i8")
    payloads.append(("tokens", "I64", [len(tokens)], tokens.view(np.uint8)))
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    for layer, page in enumerate(block.pages):
        for name, tensor in ((f"k.{layer}", page.k_htd), (f"v.{layer}", page.v_htd)):
            dtype = dtype_name(tensor.dtype)
            if dtype is None:
                raise BlockError(f"blocks of {tensor.dtype} cannot be kept in files")
            payload = codec.encode(tensor)
            shapes[name], dtypes[name] = list(tensor.shape), dtype
            stored = (dtypes[name], shapes[name]) if codec.name == Raw.name else ("U8", [payload.nbytes])
            payloads.append((name, *stored, payload))
    if block.states is not None:
        payloads.append((STATES, "U8", [block.states.nbytes], as_bytes(block.states)))
    checksums = {name: zlib.crc32(payload) for name, *_, payload in payloads}
    metadata = {
        "format": _FORMAT,
        "codec": codec.name,
        "key": block.id.key,
        "parent": block.id.parent,
        "root": block.id.root,
        "crc32": json.dumps(checksums),
        "shapes": json.dumps(shapes),
        "dtypes": json.dumps(dtypes),
    }
    header = encode_header([(name, dtype, shape, data.nbytes) for name, dtype, shape, data in payloads], metadata)
    return [memoryview(header), *(memoryview(p) for *_, p in payloads)]


@functools.lru_cache(maxsize=64)
def _read_shapes(shapes_text: str, dtypes_text: str, layers: int, tokens: int) -> _Shapes:
    """Return the shapes and dtypes of K and V of the layers in the metadata.

    Raises:
        ValueError: they contradict each other.
        RecursionError: they are nested too deeply.
    """
    shapes, dtypes = json_object(shapes_text), json_object(dtypes_text)
    names = tensor_names(layers)[1:]
    if not set(names) == set(shapes) == set(dtypes):
        raise ValueError("its shapes and dtypes are not those of its layers")
    told = [shapes[name] for name in names]
    if not all(type(shape) is list for shape in told):
        raise ValueError("a shape is no shape")
    check_layers([dtypes[name] for name in names], told, [tokens] * layers)
    return tuple(tuple(shape) for shape in told), tuple(dtypes[name] for name in names)


# Indices of tensors in the order of a header.
_TOKENS = 0


def _k(layer: int) -> int:
    return 1 + 2 * layer


def _v(layer: int) -> int:
    return 2 + 2 * layer


# Errors of paths that are no regular file: a link, a folder, a pipe without a writer.
_NO_FILE = frozenset({errno.ELOOP, errno.EISDIR, errno.ENXIO})


def what_failed(path: str | os.PathLike[str], error: OSError | MemoryError) -> BlockError:
    """Return the error that a failed system call means for a block file: damage only if the path is no file."""
    if isinstance(error, OSError) and error.errno in _NO_FILE:
        return BlockError(f"{path}: {error}")
    return UnavailableError(f"{path}: {error or type(error).__name__}")


class BlockFile:
    """A block file open for reading. Its header and ids are checked at once, each page when it is read.

    Memory is bounded for files of any writer: opening takes a header of ``MAX_HEADER_BYTES`` and the ids, a page takes
    at most the bytes of its payload and of the decoded tensor, neither larger than K or V of any model.

    Attributes:
        id: its tokens, and their place in the chain.
        is_plain: whether pages are stored as they are.

    Args:
        path: the path of the file.
        open_file: opens it for reading; by default, ``path`` as it is.
        unusable: returns the error that a failed system call means for it.
        codecs: the codecs that can be read, by name.

    Raises:
        UnavailableError: the file cannot be read now, or has an unknown version or codec. All reading methods raise it.
        BlockError: it is not a whole block of this format. Reading methods raise it when a checksum differs.
    """

    tier = "disk"

    def __init__(
        self,
        path: str,
        open_file: Callable[[], int] | None = None,
        unusable: Callable[[OSError | MemoryError], BlockError] | None = None,
        codecs: Mapping[str, Codec] = BUILT_IN,
    ) -> None:
        self.path = path
        self._file = ReadFile(open_file or partial(os.open, path, READ_FLAGS))
        self._unusable = unusable or partial(what_failed, path)
        self._when_closed: Callable[[], object] = lambda: None
        self._codecs = codecs
        try:
            with self._file as fd:
                self._read_header(fd)
        except (OSError, MemoryError) as error:
            self.close()
            raise self._unusable(error) from error
        except NOT_JSON as error:
            self.close()
            raise BlockError(f"{path}: {error}") from error
        except BlockError:
            self.close()
            raise

    def _accept(self, metadata: Mapping[str, str]) -> None:
        """Refuse another format; one of another version of kvtier may be sound."""
        told = metadata.get("format", "")
        if told != _FORMAT:
            kind = UnavailableError if _VERSIONED.fullmatch(told) else ValueError
            raise kind(f"{self.path}: format {told!r:.40}, this version reads {_FORMAT!r}")

    def _read_header(self, fd: int) -> None:
        # A header is kept as numbers in flat lists. The parsed objects of all files of a long prompt would be so many
        # that they set off a full garbage collection, which takes longer than all reading.
        opened = open_header(fd, _METADATA, self._accept)
        metadata, layout = opened.metadata, opened.layout
        self.nbytes, self._data_start = opened.nbytes, opened.data_start
        if not is_name(metadata["codec"]):
            raise ValueError(f"no codec has the name {metadata['codec']!r:.40}")
        self._shapes = told = _read_shapes(metadata["shapes"], metadata["dtypes"], opened.layers, opened.tokens)
        pages = slice(1, 1 + 2 * opened.layers)
        self.is_plain = metadata["codec"] == Raw.name
        if self.is_plain:
            fits = (layout.shapes[pages], layout.dtypes[pages]) == told
        else:
            fits = set(layout.dtypes[pages]) <= {"U8"} and all(len(shape) == 1 for shape in layout.shapes[pages])
        if not fits:
            raise ValueError("its tensors do not have the shapes and types that its metadata tell")
        if metadata["codec"] not in self._codecs:
            raise UnavailableError(
                f"{self.path}: its codec {metadata['codec']!r} is not known here; open the store with that codec as "
                "compression="
            )
        self._codec = self._codecs[metadata["codec"]]
        self._begins, self._ends = layout.begins, layout.ends
        self._crc32 = read_checksums(metadata["crc32"], layout.names)
        key, parent, root = (check_hash(metadata[name], name) for name in ("key", "parent", "root"))
        tokens: TokenIds = self._payload(_TOKENS).view("<i8").astype(np.int64)
        check_ids(tokens)
        self._is_snapshot = opened.is_checkpoint
        self.id = BlockId(key, parent, root, tokens)
        kinds = (BlockKind.CHECKPOINT,) if opened.is_checkpoint else (BlockKind.PAGES, BlockKind.WINDOW)
        if not any(map(self.id.is_a, kinds)):
            raise ValueError("its ids do not give its key")

    @property
    def spec(self) -> KVSpec:
        """Its layers."""
        shapes, dtypes = self._shapes
        return spec_of(dtypes, shapes)

    def _payload(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        begin, end = self._begins[index], self._ends[index]
        try:
            payload = np.empty(end - begin, dtype=np.uint8)
            with self._file as fd:
                fill(fd, memoryview(payload), self._data_start + begin)
        except (OSError, MemoryError) as error:
            raise self._unusable(error) from error
        except ValueError as error:
            raise BlockError(f"{self.path}: {error}") from error
        if zlib.crc32(payload) != self._crc32[index]:
            raise BlockError(f"{self.path}: checksum of tensor {index} differs")
        return payload

    def page(self, layer: int) -> Page:
        """Read the page of ``layer``."""
        import torch  # here: verifying a store reads files, but makes no tensors

        g, tokens = self.spec.layers[layer], len(self.id.tokens)
        k, v = self._payload(_k(layer)), self._payload(_v(layer))
        try:
            return Page(
                self._codec.decode(k, (g.k_heads, tokens, g.k_dim), g.dtype),
                self._codec.decode(v, (g.v_heads, tokens, g.v_dim), g.dtype),
            )
        except BlockError as error:
            raise BlockError(f"{self.path}: layer {layer}: {error}") from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise UnavailableError(f"{self.path}: no memory to decode layer {layer}") from error

    def landing(self, layer: int, first: int, last: int, view: PageView, *, check: bool = True) -> Landing:
        """Prepare to put tokens ``[first, last)`` of the page of ``layer`` into ``view``, if possible without a copy.

        Without ``check``, checksums are compared only where the page must be read as a whole.
        """
        take = partial(self._take, layer, first, last, view)
        k, v = [*view.k_htb], [*view.v_htb]  # [tokens, bytes] of each head
        begin, end = self._begins[_k(layer)], self._ends[_v(layer)]
        whole = first == 0 and last == len(self.id.tokens)
        adjacent = self._ends[_k(layer)] == self._begins[_v(layer)]
        fits = len(k) + len(v) <= _MAX_PIECES and view.nbytes == end - begin
        if not (whole and self.is_plain and adjacent and fits):
            return take
        checks = ((k, self._crc32[_k(layer)]), (v, self._crc32[_v(layer)])) if check else ()
        return partial(self._read_straight, k + v, self._data_start + begin, end - begin, checks, take)

    def _take(self, layer: int, first: int, last: int, view: PageView) -> None:
        view.take(self.page(layer), first, last)

    def _read_straight(
        self, heads: list[Bytes], at: int, nbytes: int, checks: Iterable[tuple[list[Bytes], int]], take: Landing
    ) -> None:
        """Read ``nbytes`` from offset ``at`` of the file into ``heads``; by ``take``, if they do not come at once.

        A page is contiguous in the file and scattered by heads in a buffer: one read of many pieces handles both.
        ``checks`` has the heads of each tensor, and its checksum. Other threads wait for every step between the calls
        that read and sum, so there are few.
        """
        try:
            with self._file as fd:
                came = os.preadv(fd, heads, at)
        except OSError as error:
            raise self._unusable(error) from error
        if came != nbytes:
            take()
            return
        for parts, written in checks:
            checksum = 0
            for part in parts:
                checksum = zlib.crc32(part, checksum)
            if checksum != written:
                raise BlockError(f"{self.path}: the checksum of a page differs, read at byte {at}")

    def states(self) -> torch.Tensor | None:
        """Read the states of a checkpoint."""
        if not self._is_snapshot:
            return None
        import torch

        payload = self._payload(len(self._begins) - 1)
        return as_tensor(payload, payload.shape, torch.uint8)

    def check(self) -> None:
        """Read every byte once."""
        for index in range(len(self._begins)):
            self._payload(index)

    def detach(self) -> None:
        """Do nothing: no memory is held for this reader."""

    def hold(self) -> None:
        """Keep the block readable after its file is deleted.

        Raises:
            UnavailableError: it cannot be opened now.
            BlockError: it is gone.
        """
        try:
            self._file.hold()
        except OSError as error:
            raise self._unusable(error) from error

    def when_closed(self, call: Callable[[], object]) -> None:
        """Call ``call`` once, when the file is closed, or garbage-collected without that."""
        self._when_closed = end = weakref.finalize(self, call)
        end.atexit = False

    def close(self) -> None:
        """Close the file. May be called more than once."""
        self._file.close()
        self._when_closed()
