"""The text of each token id of a tokenizer, so that a store can show text without importing the tokenizer.

A vocabulary lists tokens as the tokenizer's model has them: with a marker for spaces, or with one letter for each byte.
The marker that most tokens have tells which of these it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvtier.errors import ConfigurationError
from kvtier.store.format.vocabulary import Vocabulary

_SPACE_OF_BYTES = "\u0120"  # Ġ, the letter of the byte 32 in byte-level vocabularies
_SPACE = "\u2581"  # ▁, of SentencePiece
_INSIDE = "##"  # of WordPiece: the token goes on with a word
_Text = Callable[[str], bytes]


def checked_tokenizer(tokenizer: Any) -> Any:
    """Return ``tokenizer``, or the tokenizer of a processor; None for None.

    Raises:
        ConfigurationError: it has no vocabulary.
    """
    if tokenizer is None:
        return None
    found = tokenizer if hasattr(tokenizer, "get_vocab") else getattr(tokenizer, "tokenizer", None)
    if not hasattr(found, "get_vocab"):
        raise ConfigurationError(
            f"tokenizer={type(tokenizer).__name__} has no get_vocab(): pass a tokenizer or processor of transformers."
        )
    return found


def vocabulary_of(tokenizer: Any) -> Callable[[], Vocabulary]:
    """Read the vocabulary of ``tokenizer``; return a function that turns it into text, on any thread."""
    tokens = dict(tokenizer.get_vocab())
    added = {int(index): str(token) for index, token in dict(getattr(tokenizer, "added_tokens_decoder", {})).items()}
    specials = [int(index) for index in getattr(tokenizer, "all_special_ids", ())]
    return lambda: _vocabulary(tokens, added, specials)


def _vocabulary(tokens: Mapping[Any, int], added: Mapping[int, str], specials: Iterable[int]) -> Vocabulary:
    to_text = _way_of([token for token, index in tokens.items() if isinstance(token, str) and index not in added])
    texts = {index: token if isinstance(token, bytes) else to_text(token) for token, index in tokens.items()}
    texts |= {index: token.encode("utf-8", "replace") for index, token in added.items()}
    return Vocabulary.of(texts, specials)


def _way_of(tokens: list[str]) -> _Text:
    """Return how ``tokens``, all of a vocabulary, become text."""
    bytes_of, spaces, inside = (
        sum(token.startswith(marker) for token in tokens) for marker in (_SPACE_OF_BYTES, _SPACE, _INSIDE)
    )
    most = max(bytes_of, spaces, inside)
    if not most:
        short = sum(len(token) <= 1 or " " in token for token in tokens)
        return _as_it_is if 2 * short >= len(tokens) else _as_word
    return _from_letters_of_bytes if bytes_of == most else _from_pieces if spaces == most else _from_word_pieces


def _as_it_is(token: str) -> bytes:
    return token.encode("utf-8", "replace")


def _as_word(token: str) -> bytes:
    return b" " + _as_it_is(token)


def _from_word_pieces(token: str) -> bytes:
    return _as_it_is(token[len(_INSIDE) :]) if token.startswith(_INSIDE) else _as_word(token)


def _from_pieces(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # one byte of a character
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            return _as_it_is(token)
    return _as_it_is(token.replace(_SPACE, " "))


def _letters_of_bytes() -> dict[str, int]:
    """Return the byte of each letter: printable ones stand for themselves, the others are counted from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _letters_of_bytes()


def _from_letters_of_bytes(token: str) -> bytes:
    found = [_BYTES.get(letter) for letter in token]
    return _as_it_is(token) if None in found else bytes(byte for byte in found if byte is not None)
