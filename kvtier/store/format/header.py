"""Header of a safetensors file, read from bytes of any writer.

Hostile headers are refused here: their values are compared with each other and with hard limits before anything is
allocated or read by them. Work and memory are bounded by ``MAX_HEADER_BYTES``.
"""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from math import prod
from typing import Any, NoReturn

from kvtier.kv.safetensors_header import ITEM_BYTES, dtype_named
from kvtier.kv.spec import KVSpec, LayerSpec
from kvtier.store.chain import TokenIds

MAX_HEADER_BYTES = 2**19  # 200 layers take 70 KB
_MAX_BRACKETS = 2**15  # 200 layers take 1,600; each costs the parser as much as hundreds of bytes
MAX_LAYERS = 1024
MAX_TOKENS = 2**24  # of one file
_MAX_HEADS = _MAX_DIM = 2**16
_MAX_TOKEN_BYTES = 2**20  # of K, or of V, of one layer; 128 heads of 256 floats take 128 KiB
_MAX_DIMENSIONS = 8
_ITEM_BYTES = ITEM_BYTES | {"U8": 1, "I64": 8}
_METADATA = re.compile(r'\s*\{\s*"__metadata__"\s*:\s*')
_TENSORS = re.compile(r"\s*,(?=\s*\")")
_LONG_NUMBER = re.compile(r"[0-9]{19}")
_SIZE = re.compile(r"\[([0-9]{1,18})\]")
STATES = "states"
_HASH = re.compile(r"[0-9a-f]{64}")
# Errors of parsing JSON: a ValueError says where, a RecursionError means that brackets are nested too deeply.
NOT_JSON = (ValueError, RecursionError)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return ``pairs`` as a dict: a hook for JSON, whose readers differ in which of two equal keys counts.

    Raises:
        ValueError: a key occurs twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text:.40} where no such number belongs")


_strings = json.JSONDecoder(
    object_pairs_hook=unique, parse_int=_refuse_number, parse_float=_refuse_number, parse_constant=_refuse_number
)
_integers = json.JSONDecoder(object_pairs_hook=unique, parse_float=_refuse_number, parse_constant=_refuse_number)


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object whose numbers are integers of less than 19 digits, each key once.

    Raises:
        ValueError: it is something else.
        RecursionError: it is nested too deeply.
    """
    if _LONG_NUMBER.search(text):  # parsing a very long one is slow
        raise ValueError("a number has too many digits")
    found = _integers.decode(text)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def fill(fd: int, buffer: memoryview, offset: int) -> None:
    """Read into all of ``buffer`` from byte ``offset`` of a file.

    Raises:
        OSError: the drive fails.
        ValueError: the file ends before.
    """
    done = 0
    while done < buffer.nbytes:
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise ValueError(f"cut short at {offset + done} bytes")
        done += count


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a file in order: they begin at 0, without gaps, and each is as long as its shape says.

    ``begins`` and ``ends`` are bytes from the end of the header.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]


def read_header(
    header: bytes | bytearray, accept: Callable[[dict[str, str]], object] = lambda metadata: None
) -> tuple[dict[str, str], Layout]:
    """Return the metadata of a header (without its 8 bytes of length), and where its tensors lie.

    ``accept`` is given the metadata first, and may raise: of another version, nothing else is understood.

    Raises:
        ValueError: it is no header of safetensors, does not begin with metadata, or contradicts itself.
        RecursionError: it is nested too deeply.
    """
    if header.count(b"{") + header.count(b"[") > _MAX_BRACKETS:
        raise ValueError("its header has more brackets than that of any model")
    text = header.decode("utf-8")
    found = _METADATA.match(text)
    if found is None:
        raise ValueError("its header does not begin with metadata")
    metadata, end = _strings.raw_decode(text, found.end())
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise ValueError("its metadata are not strings")
    accept(metadata)
    comma = _TENSORS.match(text, end)
    if comma is None:
        raise ValueError("its header names no tensors")
    return metadata, _read_tensors(text[comma.end() :])


@dataclass(frozen=True, slots=True)
class Opened:
    """A file with a checked header: it has tokens, K and V of each layer in turn, and maybe states.

    ``data_start`` is where its tensors begin, ``nbytes`` its size, ``tokens`` how many ids it has.
    """

    metadata: dict[str, str]
    layout: Layout
    data_start: int
    nbytes: int
    tokens: int

    @property
    def layers(self) -> int:
        """How many layers it has K and V of."""
        return (len(self.layout.names) - 1) // 2

    @property
    def is_checkpoint(self) -> bool:
        """Whether states follow K and V."""
        return self.layout.names[-1] == STATES


def open_header(
    fd: int,
    required: Sequence[str],
    accept: Callable[[dict[str, str]], object] = lambda metadata: None,
    at_most_bytes: int = MAX_HEADER_BYTES,
) -> Opened:
    """Read the header of an open file, whose metadata must hold the ``required`` keys. ``accept`` is given them first.

    Raises:
        OSError: the drive fails.
        ValueError: it is no regular file, or no whole file of such tensors.
        RecursionError: its header is nested too deeply.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no ordinary file")
    size = bytearray(8)
    fill(fd, memoryview(size), 0)
    header_bytes = int.from_bytes(size, "little")
    if header_bytes > status.st_size - 8:
        raise ValueError("header is longer than the file")
    if header_bytes > at_most_bytes:
        raise ValueError(f"header is longer than {at_most_bytes} bytes")
    header = bytearray(header_bytes)
    fill(fd, memoryview(header), 8)
    metadata, layout = read_header(header, accept)
    missing = next((name for name in required if name not in metadata), None)
    if missing:
        raise ValueError(f"its metadata have no {missing!r}")
    if layout.names != tensor_names((len(layout.names) - 1) // 2, checkpoint=len(layout.names) % 2 == 0):
        raise ValueError("its tensors are not tokens, and K and V of each layer in turn")
    if layout.names[-1] == STATES and (layout.dtypes[-1] != "U8" or len(layout.shapes[-1]) != 1):
        raise ValueError("its states are not bytes")
    data_start = 8 + header_bytes
    if data_start + layout.ends[-1] != status.st_size:
        raise ValueError(f"{status.st_size} bytes where the header tells {data_start + layout.ends[-1]}")
    shape = layout.shapes[0]
    if layout.dtypes[0] != "I64" or len(shape) != 1 or not 0 < shape[0] <= MAX_TOKENS:
        raise ValueError(f"its tokens are not a row of ids, 1 to {MAX_TOKENS}")
    return Opened(metadata, layout, data_start, status.st_size, shape[0])


# Cached: the headers of a sequence's raw blocks differ only in their metadata.
@functools.lru_cache(maxsize=16)
def _read_tensors(text: str) -> Layout:
    packed = _read_packed(text)
    if packed is not None:
        return packed
    entries = json_object("{" + text)
    if len(entries) > 2 + 2 * MAX_LAYERS:
        raise ValueError(f"it has {len(entries)} tensors, more than {MAX_LAYERS} layers have")
    dtypes: list[str] = []
    shapes: list[list[int]] = []
    offsets: list[list[int]] = []
    for name, entry in entries.items():
        try:
            dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
            known = len(entry) == 3 and dtype in _ITEM_BYTES
            known = known and type(shape) is type(place) is list and len(shape) <= _MAX_DIMENSIONS and len(place) == 2
        except (KeyError, TypeError):  # a part is missing, or has the wrong type
            known = False
        if not known:
            raise ValueError(f"tensor {name!r:.40} has not just a type, shape and place that this version knows")
        dtypes.append(dtype)
        shapes.append(shape)
        offsets.append(place)
    if not _are_sizes(chain(*shapes, *offsets)):
        raise ValueError("a tensor has a size or place that is no natural number")
    at = 0
    for name, dtype, shape, (begin, end) in zip(entries, dtypes, shapes, offsets, strict=True):
        if begin != at or end - begin != prod(shape, start=_ITEM_BYTES[dtype]):
            raise ValueError(f"tensor {name!r:.40} does not lie where its shape and the tensors before it put it")
        at = end
    return Layout(
        tuple(entries),
        tuple(dtypes),
        tuple(map(tuple, shapes)),
        tuple(begin for begin, _ in offsets),
        tuple(end for _, end in offsets),
    )


def _read_packed(text: str) -> Layout | None:
    """Return the layout of compressed tensors if this library wrote their header, to the byte; None otherwise.

    Unlike headers of raw blocks, no two are the same. But the sizes determine all of it: writing it again and comparing
    is several times faster than parsing it.
    """
    sizes = list(map(int, _SIZE.findall(text)))
    if not 1 < len(sizes) <= 1 + 2 * MAX_LAYERS or len(sizes) % 2 == 0:
        return None
    names = tensor_names(len(sizes) // 2)
    ends = tuple(accumulate(sizes[1:], initial=8 * sizes[0]))
    begins = (0, *ends[:-1])
    written = [f'"tokens":{{"dtype":"I64","shape":[{sizes[0]}],"data_offsets":[0,{ends[0]}]}}']
    written += [
        f'"{name}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{begin},{end}]}}'
        for name, size, begin, end in zip(names[1:], sizes[1:], begins[1:], ends[1:], strict=True)
    ]
    if ",".join(written) + "}" != text.rstrip(" "):
        return None
    return Layout(names, ("I64", *("U8",) * (len(names) - 1)), tuple((size,) for size in sizes), begins, ends)


def _are_sizes(values: Iterable[object]) -> bool:
    numbers: Any = list(values)
    return set(map(type, numbers)) <= {int} and min(numbers, default=0) >= 0  # excludes bool


@functools.lru_cache(maxsize=16)
def tensor_names(layers: int, *, checkpoint: bool = False) -> tuple[str, ...]:
    """Return the names of the tensors of a file with ``layers`` layers, in order."""
    return ("tokens", *(f"{part}.{i}" for i in range(layers) for part in "kv"), *(STATES,) * checkpoint)


def check_layers(dtypes: Sequence[str], shapes: Sequence[Sequence[int]], tokens: Sequence[int]) -> None:
    """Check dtypes and shapes ``[heads, tokens, dim]``, given for K and V of each layer in turn.

    ``tokens`` has the number of tokens of each layer.

    Raises:
        ValueError: K and V do not belong together, do not have as many tokens, or are larger than those of any model.
    """
    for i in range(0, len(shapes), 2):
        item_bytes = ITEM_BYTES.get(dtypes[i]) if isinstance(dtypes[i], str) else None
        if dtypes[i + 1] != dtypes[i] or item_bytes is None:
            raise ValueError(f"layer {i // 2} is not of one type that K and V can have")
        for shape in shapes[i : i + 2]:
            if len(shape) != 3 or not all(type(size) is int for size in shape) or shape[1] != tokens[i // 2]:
                raise ValueError(f"layer {i // 2} does not fit the {tokens[i // 2]} tokens")
            if not (0 <= shape[0] <= _MAX_HEADS and 0 <= shape[2] <= _MAX_DIM):
                raise ValueError(f"layer {i // 2} has more heads or larger ones than any model")
            if shape[0] * shape[2] * item_bytes > _MAX_TOKEN_BYTES:
                raise ValueError(f"layer {i // 2} takes more than {_MAX_TOKEN_BYTES} bytes a token")


@functools.lru_cache(maxsize=64)
def spec_of(dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> KVSpec:
    """Return the layers with these dtypes and shapes ``[heads, tokens, dim]``, which ``check_layers`` has checked."""
    layers = []
    for i in range(0, len(shapes), 2):
        (k_heads, _, k_dim), (v_heads, _, v_dim) = shapes[i], shapes[i + 1]
        layers.append(LayerSpec(k_heads, k_dim, v_heads, v_dim, dtype_named(dtypes[i])))
    return KVSpec(tuple(layers))


def read_checksums(text: str, names: Sequence[str]) -> list[int]:
    """Return the CRC-32 of each of the tensors ``names`` from the JSON object ``text``.

    Raises:
        ValueError: there is not exactly one number of 32 bits for each.
        RecursionError: it is nested too deeply.
    """
    found = json_object(text)
    values: list[int] = [found.get(name, -1) for name in names]
    if len(found) != len(values) or not _are_sizes(values) or max(values, default=0) >= 2**32:
        raise ValueError("its checksums are not one number for each tensor")
    return values


def check_ids(tokens: TokenIds) -> None:
    """Check that ``tokens`` can be stored in a file.

    Raises:
        ValueError: there are none, or too many, or one is negative.
    """
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise ValueError(f"{len(tokens)} tokens, where 1 to {MAX_TOKENS} are possible")
    if int(tokens.min()) < 0:
        raise ValueError(f"{int(tokens.min())} is no token id")


def check_hash(text: str, what: str) -> str:
    """Return ``text`` if it is 64 hex digits.

    Raises:
        ValueError: it is not; the message says ``what`` it should have been.
    """
    if _HASH.fullmatch(text) is None:
        raise ValueError(f"its {what} {text!r:.80} is not 64 hex digits")
    return text
