"""Mutations that know the format: the header as JSON, the JSON within it, zstd frames, plain bytes.

Half of them get valid checksums, keys and offsets afterwards; otherwise no input would pass the first check.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

WITHIN = ("crc32", "shapes", "dtypes", "manifest")  # metadata that are JSON themselves
VALUES: tuple[Callable[[], Any], ...] = tuple(
    (lambda value=value: value)
    for value in (
        *(-1, 0, 1, 2, 3, 7, 2**16, 2**20, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**4500),
        *(True, False, None, 0.0, -0.0, 1.5, 1e300, float("inf"), float("nan")),
        *(
            "",
            "x",
            "\ud800",
            "\0",
            "../../x",
            "0" * 64,
            "x" * 5000,
            "raw",
            "zstd",
            "U8",
            "I64",
            "F32",
            "BF16",
            "F8_E4M3",
        ),
        *([], {}, [[]], [0], [0, 0], [1, 1, 1], [2**40] * 3, [0] * 2000, {"k.0": [1, 1, 1]}, {"dtype": "U8"}),
        *(
            "kvtier/1",
            "kvtier/2",
            "kvtier-prefix/1",
            "kvtier-prefix/9",
            "[" * 5000,
            '{"a":' * 100,
            "{}",
            "null",
            "1e400",
        ),
    )
)
FRAMES = (
    b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**40) + b"\x01\x00\x00",
    b"\x28\xb5\x2f\xfd\x80\x90" + struct.pack("<I", 2**31) + b"\x01\x00\x00",
    b"\x50\x2a\x4d\x18\x04\x00\x00\x00none",
    b"\x28\xb5\x2f\xfd",
)


def mutate(data: bytes, seed: int) -> bytes:
    """Return ``data`` with one to four changes."""
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice((_header, _header, _header, _text, _bytes, _frame))(data, rng)
    return _put_right(data) if rng.random() < 0.5 else data


def split(data: bytes) -> tuple[bytes, bytes]:
    """Return the header and the payload."""
    size = struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0]
    return data[8 : 8 + size], data[8 + size :]


def join(header: bytes, payload: bytes) -> bytes:
    """Return the file that consists of a header and a payload."""
    return struct.pack("<Q", len(header)) + header + payload


def _parsed(header: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(header)
        if isinstance(found, dict):
            return found
    return None


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # an integer with more digits than Python writes
        return "9" * 4500


def _header(data: bytes, rng: random.Random) -> bytes:
    header, payload = split(data)
    tree = _parsed(header)
    if tree is None:
        return _bytes(data, rng)
    inside = tree.get("__metadata__")
    if isinstance(inside, dict) and rng.random() < 0.4:
        name = rng.choice(WITHIN)
        inner = _parsed(str(inside.get(name)).encode(errors="replace"))
        if inner is not None:
            _change(inner, rng)
            inside[name] = _dumped(inner)
    else:
        _change(tree, rng)
    return join(_dumped(tree).encode(errors="replace"), payload)


def _change(tree: Any, rng: random.Random) -> None:
    """Change one value, key or order, anywhere in ``tree``."""
    place = tree
    while True:
        inner = [v for v in (place.values() if isinstance(place, dict) else place) if isinstance(v, (dict, list)) and v]
        if not inner or rng.random() < 0.3:
            break
        place = rng.choice(inner)
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if not keys:
        return
    key, other = rng.choice(keys), rng.choice(keys)
    how = rng.randrange(6)
    if how == 0:
        del place[key]
    elif how == 1:
        place[key], place[other] = place[other], place[key]
    elif how == 2 and isinstance(place, dict):
        place[rng.choice(("k.0", "v.0", "k.1", "k.2", "v.2", "tokens", "__metadata__", "", "k.00", "k.-1"))] = place[
            key
        ]
    elif how == 3 and isinstance(place, dict):
        place[key] = place.pop(key)
    elif how == 4 and type(place[key]) is int:
        place[key] += rng.choice((-8, -1, 1, 8, 256))
    else:
        place[key] = rng.choice(VALUES)()


def _text(data: bytes, rng: random.Random) -> bytes:
    """Change the header as text: parsing and writing JSON would not produce these changes."""
    header, payload = split(data)
    at = rng.randrange(len(header) + 1)
    end = min(len(header), at + rng.choice((0, 1, 4, 40)))
    piece = rng.choice(
        (
            header[at:end],
            b'"k.0":',
            b"{",
            b"[" * 3000,
            b",",
            b" " * 100,
            b"1e400",
            b"NaN",
            b"-",
            b"\xff",
            b"9" * 5000,
            b"",
        )
    )
    header = header[:at] + piece + header[end if rng.random() < 0.5 else at :]
    return join(header, payload)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    how = rng.randrange(5)
    if how == 0:
        return data[:at]
    if how == 1:
        return data + rng.randbytes(rng.choice((1, 8, 100)))
    if how == 2:
        stop = min(len(data), at + rng.choice((1, 8, 64)))
        return data[:at] + bytes(stop - at) + data[stop:]
    if how == 3:
        return struct.pack("<Q", rng.choice((0, 1, 2**20, 2**20 + 1, 2**40, 2**63, 2**64 - 1))) + data[8:]
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _frame(data: bytes, rng: random.Random) -> bytes:
    """Put another frame into a tensor."""
    header, payload = split(data)
    tree = _parsed(header)
    try:
        begin, end = tree["k.0"]["data_offsets"]
        frame = rng.choice(FRAMES)
        piece = struct.pack("<Q", rng.choice((len(frame), 0, 2**40))) + frame
        piece += payload[begin + len(piece) : end]
        tree["k.0"]["data_offsets"][1] = begin + len(piece)
        changed = payload[:begin] + piece + payload[end:]
    except (KeyError, TypeError, ValueError, IndexError):
        return _bytes(data, rng)
    return join(_dumped(tree).encode(errors="replace"), changed)


def _put_right(data: bytes) -> bytes:
    """Make offsets consecutive, and checksums and key match the contents, as far as possible."""
    header, payload = split(data)
    tree = _parsed(header)
    try:
        metadata = tree["__metadata__"]
        checksums, at = json.loads(metadata["crc32"]), 0
        for name, entry in tree.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                entry["data_offsets"] = [at, at + end - begin]
                at += end - begin
                checksums[name] = zlib.crc32(payload[at - (end - begin) : at])
        metadata["crc32"] = json.dumps(checksums)
        if "key" in metadata:
            ids = payload[: tree["tokens"]["data_offsets"][1]]
            metadata["key"] = hashlib.sha256(bytes.fromhex(metadata["parent"]) + ids).hexdigest()
        return join(_dumped(tree).encode(errors="replace"), payload[:at])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError):
        return data
