"""Vocabularies: the text of each token id of a tokenizer, as one small file from any writer.

Layout: a line ``kvtier-vocabulary/1``, then one zlib stream of little-endian numbers and bytes: the number of tokens
(u32), whether it is the whole vocabulary (u32: 0 or 1), the ids in rising order (u32 each), where the text of each ends
(u32 each), whether each is special (u8 each), and all texts as UTF-8 without separators. The text of one token may be
a part of a character.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from kvtier.store.chain import TokenIds

_MAGIC = b"kvtier-vocabulary/1\n"
MAX_FILE_BYTES = 16 * 2**20
_MAX_BYTES = 64 * 2**20  # decompressed; 256,000 tokens take 4 MiB
_MAX_ID = 2**31
_UNKNOWN = "\ufffd".encode()


class Vocabulary:
    """The text of token ids. Immutable.

    Attributes:
        is_whole: whether it is all of a tokenizer's, not only what some sequences needed.
    """

    def __init__(
        self,
        ids: npt.NDArray[np.uint32],
        ends: npt.NDArray[np.uint32],
        specials: npt.NDArray[np.uint8],
        texts: bytes,
        *,
        is_whole: bool,
    ) -> None:
        self._ids, self._ends, self._specials, self._texts = ids, ends, specials, texts
        self._begins = np.concatenate([np.zeros(1, dtype=ends.dtype), ends])[:-1]
        # A token without text takes its text from behind all others, and so does a special one that is not wanted.
        self._bytes = np.frombuffer(texts + _UNKNOWN + b" ", dtype=np.uint8)
        self.is_whole = is_whole

    @classmethod
    def of(cls, texts: Mapping[int, bytes], specials: Iterable[int] = (), *, is_whole: bool = True) -> Vocabulary:
        """Return the vocabulary of ``texts`` (id → UTF-8); negative ids and ids from 2**31 on are left out."""
        ids = sorted(index for index in texts if 0 <= index < _MAX_ID)
        special = set(specials)
        ends = np.cumsum([len(texts[index]) for index in ids], dtype=np.int64) if ids else np.empty(0, np.int64)
        return cls(
            np.array(ids, dtype=np.uint32),
            ends.astype(np.uint32),
            np.array([index in special for index in ids], dtype=np.uint8),
            b"".join(texts[index] for index in ids),
            is_whole=is_whole,
        )

    def __len__(self) -> int:
        return len(self._ids)

    def text(self, tokens: TokenIds, *, specials: bool = True) -> str:
        """Return the text of ``tokens``; ids without text become U+FFFD. Without ``specials`` those become a space."""
        begin = np.full(len(tokens), len(self._texts))
        end = begin + len(_UNKNOWN)
        if len(self._ids):
            places = np.minimum(np.searchsorted(self._ids, tokens), len(self._ids) - 1)
            is_known = self._ids[places] == tokens
            begin[is_known], end[is_known] = self._begins[places[is_known]], self._ends[places[is_known]]
            if not specials:
                is_special = is_known & (self._specials[places] != 0)
                begin[is_special], end[is_special] = len(self._bytes) - 1, len(self._bytes)
        lengths = end - begin
        written = np.cumsum(lengths) - lengths  # where the text of each token goes
        where = np.repeat(begin - written, lengths) + np.arange(int(lengths.sum()))
        return self._bytes[where].tobytes().decode("utf-8", errors="replace")

    def _text(self, place: int) -> bytes:
        return self._texts[int(self._ends[place - 1]) if place else 0 : int(self._ends[place])]

    def only(self, tokens: TokenIds) -> Vocabulary:
        """Return the part that ``tokens`` need."""
        wanted = set(tokens.tolist())
        return self._of({index: text for index, text in self._items().items() if index in wanted}, self)

    def only_part(self) -> Vocabulary:
        """Return the same, marked as not whole."""
        return Vocabulary(self._ids, self._ends, self._specials, self._texts, is_whole=False)

    def with_all_of(self, other: Vocabulary) -> Vocabulary:
        """Return this vocabulary with the ids of ``other`` that it lacks."""
        return self._of({**other._items(), **self._items()}, self, other)

    def _items(self) -> dict[int, bytes]:
        return {index: self._text(place) for place, index in enumerate(self._ids.tolist())}

    def _special_ids(self) -> set[int]:
        return set(self._ids[self._specials != 0].tolist())

    @staticmethod
    def _of(texts: Mapping[int, bytes], *sources: Vocabulary) -> Vocabulary:
        specials = set[int]().union(*(source._special_ids() for source in sources))
        return Vocabulary.of(texts, specials, is_whole=False)

    def encode(self) -> bytes:
        """Return the bytes of a file."""
        numbers = np.array([len(self._ids), self.is_whole], dtype="<u4")
        parts = (numbers, self._ids.astype("<u4"), self._ends.astype("<u4"), self._specials)
        return _MAGIC + zlib.compress(b"".join(part.tobytes() for part in parts) + self._texts)

    @classmethod
    def decode(cls, data: bytes) -> Vocabulary:
        """Return the vocabulary of a file, in bounded memory whatever its bytes are.

        Raises:
            ValueError: it is no file of a vocabulary.
        """
        if not data.startswith(_MAGIC):
            raise ValueError("it is no vocabulary, or of a version that is not known here")
        stream = zlib.decompressobj()
        try:
            content = stream.decompress(data[len(_MAGIC) :], _MAX_BYTES)
        except zlib.error as error:
            raise ValueError(f"its vocabulary is damaged: {error}") from error
        if not stream.eof or stream.unused_data or len(content) < 8:
            raise ValueError("its vocabulary is too large, or cut short")
        count, is_whole = np.frombuffer(content[:8], dtype="<u4").tolist()
        begin = 8 + 9 * count
        if begin > len(content) or is_whole > 1:
            raise ValueError("its vocabulary is cut short")
        ids = np.frombuffer(content, dtype="<u4", count=count, offset=8)
        ends = np.frombuffer(content, dtype="<u4", count=count, offset=8 + 4 * count)
        specials = np.frombuffer(content, dtype=np.uint8, count=count, offset=8 + 8 * count)
        texts = content[begin:]
        rising = bool(np.all(ids[1:] > ids[:-1])) and bool(np.all(ends[1:] >= ends[:-1]))
        if not rising or (int(ends[-1]) if count else 0) != len(texts):
            raise ValueError("its vocabulary contradicts itself")
        return cls(ids.astype(np.uint32), ends.astype(np.uint32), specials, texts, is_whole=bool(is_whole))
