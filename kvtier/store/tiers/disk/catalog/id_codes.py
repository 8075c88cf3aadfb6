"""Token ids as bytes that sort and share prefixes as the ids do.

An id below ``0xFF0000`` takes 3 bytes, the most significant first; any other takes ``0xFF`` and its 8 bytes. No code of
an id is a prefix of another. So sequences have the same order in both forms (negative ids count as unsigned, after all
others), and a sequence is a prefix of another in both forms or in neither. A longer common prefix in bytes never means
a shorter common prefix in ids.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtier.store.chain import TokenIds

_FIRST_LONG = 0xFF0000
_SHORT_BYTES, _LONG_BYTES = 3, 9


def encode_ids(tokens: TokenIds) -> bytes:
    """Return the code of ``tokens``, 3 or 9 bytes for each."""
    values = np.ascontiguousarray(tokens, dtype=np.int64).view(np.uint64)
    if not len(values) or values.max() < _FIRST_LONG:
        return values.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    is_long = values >= _FIRST_LONG
    digits = values.astype(">u8").view(np.uint8).reshape(-1, 8)
    sizes = np.where(is_long, _LONG_BYTES, _SHORT_BYTES)
    starts = np.cumsum(sizes) - sizes
    code = np.full(int(sizes.sum()), 0xFF, dtype=np.uint8)
    for is_of_size, first, count in ((is_long, 1, 8), (~is_long, 0, _SHORT_BYTES)):
        code[starts[is_of_size][:, None] + first + np.arange(count)] = digits[is_of_size, -count:]
    return code.tobytes()


def decode_ids(code: bytes) -> TokenIds:
    """Return the ids that ``code`` encodes.

    Raises:
        ValueError: it is not a valid code.
    """
    if len(code) % _SHORT_BYTES:
        raise ValueError(f"{len(code)} bytes are no code of ids")
    triples = np.frombuffer(code, dtype=np.uint8).reshape(-1, _SHORT_BYTES)
    padded = np.zeros((len(triples), 4), dtype=np.uint8)
    padded[:, 1:] = triples
    values = padded.view(">u4").ravel().astype(np.int64)
    if not len(values) or values.max() < _FIRST_LONG:
        return values
    is_start = np.ones(len(triples), dtype=bool)
    long_starts: list[int] = []
    ends_at = 0
    for start in np.flatnonzero(triples[:, 0] == 0xFF).tolist():
        if start >= ends_at:  # otherwise it is inside a long code
            ends_at = start + _LONG_BYTES // _SHORT_BYTES
            long_starts.append(start)
            is_start[start + 1 : ends_at] = False
    if ends_at > len(triples):
        raise ValueError("a code of ids is cut off")
    longs = _longs(triples, np.array(long_starts))
    if (longs < _FIRST_LONG).any():
        raise ValueError("a code of ids is longer than it has to be")
    values[long_starts] = longs.view(np.int64)
    found: TokenIds = values[is_start]
    return found


def _longs(triples: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return the ids whose 9-byte codes begin at ``starts``."""
    codes = triples[starts[:, None] + np.arange(3)].reshape(-1, _LONG_BYTES)
    return np.ascontiguousarray(codes[:, 1:]).view(">u8").ravel().astype(np.uint64)
