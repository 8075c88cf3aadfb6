"""Archives: one prefix as one safetensors file, for another store or other tools.

``tokens`` [n], and ``k.0``, ``v.0``, ``k.1``, … ``[heads, n, dim]`` for the whole sequence, as they are in memory; for
a model with states also ``states`` (U8), valid after the last token. The metadata hold ``format``, ``root``,
``manifest`` (description of the root, as JSON), ``block_size``, ``crc32`` of each tensor and, if they are known,
``name``, ``vocabulary`` (base64 of ``kvtier.store.format.vocabulary``, for the tokens of the prefix) and ``chat`` (the
conversation saved under the name: a JSON object, compressed by zlib, as base64).

A sliding layer has the last tokens alone, ``[heads, n - start, dim]``, or none, ``[0, n, 0]``. The metadata hold
``windows``, as JSON, if there are some: ``start``, and ``layers``, the indices of the layers that begin there.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from kvtier.errors import ArchiveError, BlockError, ConfigurationError
from kvtier.kv.codecs.base import as_tensor
from kvtier.kv.page import Page, PageView
from kvtier.kv.safetensors_header import dtype_name, encode_header
from kvtier.kv.spec import KVSpec, LayerSpec
from kvtier.store.block import BlockReader
from kvtier.store.chain import TokenIds
from kvtier.store.format.header import (
    MAX_HEADER_BYTES,
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
    unique,
)
from kvtier.store.format.vocabulary import Vocabulary
from kvtier.store.names import checked_name

if TYPE_CHECKING:
    import torch

_FORMAT = "kvtier-prefix/1"
_FORMATS = re.compile(r"kvtier-prefix/([0-9]{1,9})")
_METADATA = ("format", "root", "manifest", "block_size", "crc32")
_BLOCK_SIZE = re.compile(r"[1-9][0-9]{0,8}")
_MAX_MANIFEST_BYTES = 128 * 2**10  # a model with adapters needs some 10 KiB
_MAX_MANIFEST_DEPTH = 32
_MAX_PACKED_CHAT_BYTES = 16 * 2**20  # some ten million tokens
_MAX_CHAT_BYTES = 256 * 2**20
_MAX_HEADER_BYTES = MAX_HEADER_BYTES + _MAX_PACKED_CHAT_BYTES
_MAX_VOCABULARY_BYTES = 128 * 2**10  # 10,000 tokens that all differ take 80 KiB
_CHECKED_BYTES = 4 * 2**20  # read at once by ``check``
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)


def write_archive(
    file: str | os.PathLike[str],
    blocks: Sequence[BlockReader],
    tokens: int,
    *,
    windows: Sequence[BlockReader] = (),
    root: str,
    manifest: Mapping[str, Any],
    block_size: int,
    name: str | None = None,
    chat: Mapping[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
    overwrite: bool = False,
) -> int:
    """Write a prefix to ``file``, which only the user can read (0600): the whole file, or none.

    Takes memory for one layer of the prefix.

    Args:
        file: the path, in an existing folder.
        blocks: the chain, open for reading, the first block first.
        tokens: length of the prefix; it may end within the last block.
        windows: window blocks, open for reading: one for each of the last blocks.
        root: the root of the chain.
        manifest: description of the root; values that JSON does not know are written as strings.
        block_size: tokens of a full block in the store it comes from.
        name: the name of the prefix, if it has one.
        chat: the conversation that was saved under the name, if there is one.
        vocabulary: the text of its token ids, if it is known; left out where it is long.
        overwrite: whether ``file`` may exist already.

    Returns:
        Bytes of the file.

    Raises:
        ArchiveError: the file cannot be written, could not be read again, or exists already.
        BlockError: a block cannot be read; the file is not written.
    """
    target = Path(file)
    metadata = {"format": _FORMAT, "root": root, "manifest": json.dumps(dict(manifest), default=str)}
    metadata |= {"block_size": str(block_size)} | ({} if name is None else {"name": name})
    if chat is not None:
        metadata["chat"] = _packed(chat)
        if len(metadata["chat"]) > _MAX_PACKED_CHAT_BYTES:
            raise ArchiveError(f"cannot write {target}: its chat takes more than {_MAX_PACKED_CHAT_BYTES} bytes")
    if len(metadata["manifest"]) > _MAX_MANIFEST_BYTES:
        raise ArchiveError(
            f"cannot write {target}: what its root stands for takes more than {_MAX_MANIFEST_BYTES} bytes"
        )
    if not _BLOCK_SIZE.fullmatch(metadata["block_size"]):
        raise ArchiveError(f"cannot write {target}: a block size of {block_size} would be refused when it is read")
    spec, ids = _one_sequence(target, blocks, tokens)
    if vocabulary is not None:
        text = base64.b64encode(vocabulary.only(ids).encode()).decode()
        metadata |= {"vocabulary": text} if len(text) <= _MAX_VOCABULARY_BYTES else {}
    start = sum(len(block.id.tokens) for block in blocks[: len(blocks) - len(windows)])
    layers = _layers(target, blocks, windows, start, spec)
    if sliding := [index for index, layer in enumerate(layers) if layer.blocks is windows]:
        metadata["windows"] = json.dumps({"start": start, "layers": sliding})
    states = blocks[-1].states() if sum(len(block.id.tokens) for block in blocks) == tokens else None
    temporary = target.with_name(f".{target.name}-{os.getpid()}-{uuid.uuid4().hex}.tmp")
    try:
        if not overwrite and os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "exists already", str(target))
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "wb") as out:
                nbytes = _write(out, layers, ids, states, metadata)
                out.flush()
                os.fsync(out.fileno())
            _give_name(temporary, target, overwrite)
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError as error:
        raise ArchiveError(f"{target} exists already; pass overwrite=True or another name") from error
    except OSError as error:
        raise ArchiveError(f"cannot write {target}: {error}; pass a file in a folder you can write to") from error
    return nbytes


def _one_sequence(target: Path, blocks: Sequence[BlockReader], tokens: int) -> tuple[KVSpec, TokenIds]:
    """Return the layers and the token ids of a chain.

    Raises:
        ArchiveError: it does not have ``tokens`` tokens, or its blocks are not of one model.
    """
    ids = np.concatenate([np.empty(0, dtype=np.int64), *(block.id.tokens for block in blocks)])
    known = len(ids) - (len(blocks[-1].id.tokens) if blocks else 0)
    if not known < tokens <= len(ids):
        raise ArchiveError(f"cannot write {target}: the blocks have {len(ids)} tokens where the prefix has {tokens}")
    spec = blocks[0].spec
    if not all(block.spec.is_like(spec) for block in blocks) or len(spec.layers) > MAX_LAYERS:
        raise ArchiveError(f"cannot write {target}: the blocks are not of the layers of one model")
    try:
        check_ids(ids[:tokens])
    except ValueError as error:
        raise ArchiveError(f"cannot write {target}: {error}") from error
    return spec, ids[:tokens]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of an archive: the blocks that have its pages, and the index of their first token."""

    spec: LayerSpec
    blocks: Sequence[BlockReader]
    start: int


def _layers(
    target: Path, blocks: Sequence[BlockReader], windows: Sequence[BlockReader], start: int, spec: KVSpec
) -> list[_Layer]:
    """Return the layers of a chain; those of which it has no bytes are read from its ``windows``, from ``start`` on.

    Raises:
        ArchiveError: the window blocks are not of the layers of the chain.
    """
    of_windows = windows[0].spec if windows else spec
    if not all(w.spec.is_like(of_windows) for w in windows) or len(of_windows.layers) != len(spec.layers):
        raise ArchiveError(f"cannot write {target}: the blocks are not of the layers of one model")
    return [
        _Layer(w, windows, start) if not g.token_bytes and w.token_bytes else _Layer(g, blocks, 0)
        for g, w in zip(spec.layers, of_windows.layers, strict=True)
    ]


def _write(
    out: BinaryIO,
    layers: Sequence[_Layer],
    ids: TokenIds,
    states: torch.Tensor | None,
    metadata: Mapping[str, str],
) -> int:
    tensors: list[tuple[str, str, Sequence[int], int]] = [("tokens", "I64", [len(ids)], 8 * len(ids))]
    for i, layer in enumerate(layers):
        g, tokens = layer.spec, len(ids) - layer.start
        dtype = dtype_name(g.dtype)
        if dtype is None:
            raise BlockError(f"K and V of {g.dtype} cannot be kept in files")
        tensors.append((f"k.{i}", dtype, [g.k_heads, tokens, g.k_dim], g.k_bytes * tokens))
        tensors.append((f"v.{i}", dtype, [g.v_heads, tokens, g.v_dim], g.v_bytes * tokens))
    payloads = _payloads(layers, ids)
    if states is not None:
        tensors.append((STATES, "U8", [states.nbytes], states.nbytes))
        payloads = chain(payloads, [memoryview(states.numpy())])
    # The checksums come first in the file and are known last: leave room for the longest possible ones.
    checksums = {name: 2**32 - 1 for name, *_ in tensors}
    room = len(encode_header(tensors, {**metadata, "crc32": json.dumps(checksums)}))
    out.seek(room)
    for (name, *_), payload in zip(tensors, payloads, strict=True):
        checksums[name] = zlib.crc32(payload)
        out.write(payload)
    nbytes = out.tell()
    out.seek(0)
    out.write(encode_header(tensors, {**metadata, "crc32": json.dumps(checksums)}, at_least=room))
    return nbytes


def _payloads(layers: Sequence[_Layer], ids: TokenIds) -> Iterator[memoryview]:
    """Yield the bytes of each tensor in turn. They are valid until the next tensor is requested."""
    yield memoryview(np.ascontiguousarray(ids, dtype="<i8").view(np.uint8))
    places: dict[tuple[LayerSpec, int], PageView] = {}
    for index, layer in enumerate(layers):
        g, tokens = layer.spec, len(ids) - layer.start
        if (g, tokens) not in places:
            places.clear()  # one layer at a time; memory written before is faster
            item_bytes = g.dtype.itemsize
            k = np.empty((g.k_heads, tokens, g.k_dim * item_bytes), dtype=np.uint8)
            v = np.empty((g.v_heads, tokens, g.v_dim * item_bytes), dtype=np.uint8)
            places[g, tokens] = PageView(k, v)
        view, start = places[g, tokens], 0
        for block in layer.blocks if g.token_bytes else ():
            stop = min(start + len(block.id.tokens), tokens)
            block.landing(index, 0, stop - start, view.cut(start, stop))()
            start = stop
        for part in (view.k_htb, view.v_htb):
            yield memoryview(part.reshape(-1))


def _give_name(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give the file ``temporary`` the name ``target``.

    Raises:
        FileExistsError: ``target`` was made in the meantime, and may not be overwritten.
    """
    if overwrite:
        temporary.replace(target)
    else:
        try:
            os.link(temporary, target)  # unlike a rename, it replaces nothing
        except FileExistsError:
            raise
        except OSError:  # not every drive has links
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "exists already", str(target)) from None
            temporary.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Archive:
    """An archive open for reading, from any writer.

    Opening checks the whole header and the token ids; only ``check`` checks K and V. No check can tell whether they are
    those that the model computes for these tokens: the writer must be trusted.

    Attributes:
        root: the root of the prefix.
        manifest: description of the root, by the writer of the file.
        block_size: tokens of a full block in the store it comes from.
        tokens: its token ids.
        name: its name; None if it has none, or an invalid one.
        chat: the conversation that was saved under the name; None without one.
        vocabulary: the text of its token ids; None if it has none.
        window_start: index of the first token of layers that have the last tokens alone; ``len(tokens)`` without such.
        nbytes: size of the file.

    Raises:
        ArchiveError: the file cannot be read, or is not a whole archive of this format. All reading methods raise it.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.path = os.fspath(file)
        self._fd = -1
        try:
            self._fd = os.open(self.path, _OPEN_FLAGS)
            self._read_header()
        except (OSError, *NOT_JSON) as error:
            self.close()
            raise self._refused(error) from error

    def _refused(self, problem: object) -> ArchiveError:
        return ArchiveError(f"{self.path} cannot be imported: {problem}; export the prefix again where it comes from")

    def _read_header(self) -> None:
        opened = open_header(self._fd, _METADATA, at_most_bytes=_MAX_HEADER_BYTES)
        metadata, layout = opened.metadata, opened.layout
        if metadata["format"] != _FORMAT:
            newer = _FORMATS.fullmatch(metadata["format"])
            hint = "; it is of a newer kvtier: update this one" if newer and int(newer[1]) > 1 else ""
            raise ValueError(f"its format is {metadata['format']!r:.40}, this version reads {_FORMAT!r}{hint}")
        if not opened.layers and not opened.is_checkpoint:
            raise ValueError("it has no layers")
        self.nbytes, self._data_start = opened.nbytes, opened.data_start
        self._begins, self._ends = layout.begins, layout.ends
        self._crc32 = read_checksums(metadata["crc32"], layout.names)
        self.root = check_hash(metadata["root"], "root")
        pages = slice(1, 1 + 2 * opened.layers)
        self.window_start, self._sliding = _read_windows(metadata.get("windows"), opened.layers, opened.tokens)
        starts = [self.window_start if layer in self._sliding else 0 for layer in range(opened.layers)]
        tokens_of_layers = [opened.tokens - start for start in starts]
        check_layers(layout.dtypes[pages], layout.shapes[pages], tokens_of_layers)
        self._shapes = layout.shapes[pages], layout.dtypes[pages]
        self._is_snapshot = opened.is_checkpoint
        if not _BLOCK_SIZE.fullmatch(metadata["block_size"]):
            raise ValueError(f"its block size {metadata['block_size']!r:.40} is not a number of tokens")
        self.block_size = int(metadata["block_size"])
        self.manifest = _read_manifest(metadata["manifest"])
        self.name = _read_name(metadata.get("name"))
        self.chat = _unpacked(metadata["chat"]) if "chat" in metadata else None
        self.vocabulary = _read_vocabulary(metadata.get("vocabulary"))
        tokens = np.empty(opened.tokens, dtype="<i8")
        fill(self._fd, memoryview(tokens.view(np.uint8)), self._data_start)
        if zlib.crc32(tokens) != self._crc32[0]:
            raise ValueError("the checksum of its tokens differs")
        self.tokens: TokenIds = tokens.astype(np.int64)
        check_ids(self.tokens)

    @property
    def spec(self) -> KVSpec:
        """Its layers."""
        shapes, dtypes = self._shapes
        return spec_of(dtypes, shapes)

    def pages(self, start: int, stop: int) -> tuple[Page, ...]:
        """Return K and V of all layers for the tokens ``[start, stop)``, in memory owned by the caller.

        The pages of layers that have the last tokens alone are empty.

        Raises:
            ConfigurationError: the prefix has no such tokens.
        """
        return self._pages(start, stop, 0, windows=False)

    def window_pages(self, start: int, stop: int) -> tuple[Page, ...]:
        """Return the same of the layers that have the last tokens alone; the pages of all others are empty.

        Raises:
            ConfigurationError: these layers have no such tokens.
        """
        return self._pages(start, stop, self.window_start, windows=True)

    def _pages(self, start: int, stop: int, begin: int, *, windows: bool) -> tuple[Page, ...]:
        """Return the pages of layers whose first token is ``begin``."""
        if not begin <= start < stop <= len(self.tokens):
            raise ConfigurationError(
                f"start={start} and stop={stop} are not within the {len(self.tokens) - begin} tokens from {begin} on."
            )
        nothing = Page.empty(stop - start)
        pages = []
        for i, g in enumerate(self.spec.layers):
            if (i in self._sliding) == windows:
                k = self._cut(1 + 2 * i, g.k_heads, g.k_dim, g.dtype, start - begin, stop - begin)
                pages.append(Page(k, self._cut(2 + 2 * i, g.v_heads, g.v_dim, g.dtype, start - begin, stop - begin)))
            else:
                pages.append(nothing)
        return tuple(pages)

    def states(self) -> torch.Tensor | None:
        """Return the states after the last token, U8 ``[bytes]``; None for models without."""
        if not self._is_snapshot:
            return None
        import torch  # here: the header of an archive is read without

        states = np.empty(self._ends[-1] - self._begins[-1], dtype=np.uint8)
        self._fill(memoryview(states), self._data_start + self._begins[-1])
        return as_tensor(states, states.shape, torch.uint8)

    def _cut(self, index: int, heads: int, dim: int, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        """Return the tokens ``[start, stop)`` of tensor ``index``, counted from its own first token."""
        row_bytes = dim * dtype.itemsize
        tokens = len(self.tokens) - (self.window_start if (index - 1) // 2 in self._sliding else 0)
        part = np.empty((heads, (stop - start) * row_bytes), dtype=np.uint8)
        begin = self._data_start + self._begins[index]
        for head in range(heads):
            self._fill(memoryview(part[head]), begin + (head * tokens + start) * row_bytes)
        shape = (heads, stop - start, dim)
        return as_tensor(part.reshape(-1), shape, dtype)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        try:
            fill(self._fd, buffer, offset)
        except (OSError, ValueError) as error:
            raise self._refused(error) from error

    def check(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every byte once, in little memory.

        Args:
            progress: called with the bytes read so far, and the total.

        Raises:
            ArchiveError: a checksum differs, or a byte cannot be read.
        """
        buffer = memoryview(bytearray(min(_CHECKED_BYTES, self.nbytes)))
        for index, (begin, end) in enumerate(zip(self._begins, self._ends, strict=True)):
            checksum = 0
            for at in range(begin, end, _CHECKED_BYTES):
                part = buffer[: min(_CHECKED_BYTES, end - at)]
                self._fill(part, self._data_start + at)
                checksum = zlib.crc32(part, checksum)
                if progress is not None:
                    progress(self._data_start + at + len(part), self.nbytes)
            if checksum != self._crc32[index]:
                raise self._refused(f"the checksum of tensor {index} differs")

    def close(self) -> None:
        """Close the file. May be called more than once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_vocabulary(text: str | None) -> Vocabulary | None:
    """Return the vocabulary in the metadata.

    Raises:
        ValueError: it is none.
    """
    if text is None:
        return None
    if len(text) > _MAX_VOCABULARY_BYTES:
        raise ValueError("its vocabulary is too long")
    return Vocabulary.decode(base64.b64decode(text, validate=True))


def _read_windows(text: str | None, layers: int, tokens: int) -> tuple[int, frozenset[int]]:
    """Return the first token of layers that have the last tokens alone, and their indices.

    Raises:
        ValueError: it is no JSON object with both, or ``layers`` and ``tokens`` contradict it.
        RecursionError: it is nested too deeply to be parsed.
    """
    if text is None:
        return tokens, frozenset()
    found = json_object(text)
    start, sliding = found.get("start"), found.get("layers")
    if set(found) != {"start", "layers"} or type(start) is not int or not 0 <= start < tokens:
        raise ValueError("its windows do not begin within its tokens")
    if not isinstance(sliding, list) or not sliding or not all(type(i) is int and 0 <= i < layers for i in sliding):
        raise ValueError("its windows are not of its layers")
    return start, frozenset(sliding)


def _read_manifest(text: str) -> dict[str, Any]:
    """Return the description of a root.

    Raises:
        ValueError: it is no JSON object, too long, or too deep.
        RecursionError: it is nested too deeply to be parsed.
    """
    if len(text) > _MAX_MANIFEST_BYTES:
        raise ValueError(f"its manifest is longer than {_MAX_MANIFEST_BYTES} characters")
    manifest = json.loads(text, object_pairs_hook=unique)
    if not isinstance(manifest, dict):
        raise ValueError("its manifest is no JSON object")
    _check_depth(manifest, _MAX_MANIFEST_DEPTH)
    return manifest


def _packed(chat: Mapping[str, Any]) -> str:
    text = json.dumps(dict(chat), ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode())).decode("ascii")


def _unpacked(text: str) -> dict[str, Any]:
    """Return a chat.

    Raises:
        ValueError: it is no base64, not compressed, longer than any chat, or no JSON object.
        RecursionError: it is nested too deeply to be parsed.
    """
    unpack = zlib.decompressobj()
    try:
        data = unpack.decompress(base64.b64decode(text, validate=True), _MAX_CHAT_BYTES)
    except zlib.error as error:
        raise ValueError(f"its chat cannot be unpacked: {error}") from error
    if not unpack.eof:
        raise ValueError(f"its chat is cut short, or has more than {_MAX_CHAT_BYTES} bytes")
    chat = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(chat, dict):
        raise ValueError("its chat is no JSON object")
    return chat


def _check_depth(value: object, levels: int) -> None:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if levels == 0:
        raise ValueError(f"its manifest is nested more than {_MAX_MANIFEST_DEPTH} levels deep")
    for child in children:
        _check_depth(child, levels - 1)


def _read_name(name: str | None) -> str | None:
    with contextlib.suppress(ConfigurationError):  # the prefix is usable without it
        return checked_name(name)
    return None
