"""Transcript: the text of a conversation as its prompts showed it, and the token ids that stand for each part.

The ids that a model generates may differ from the ids that its tokenizer makes of their text. Both are the same text,
but a prompt shares K and V with an earlier one only as far as the ids are the same. So a conversation goes on with the
ids that were generated, as long as the next prompt has the same text in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_EXCERPT = 40  # characters

Encode = Callable[[str, int], tuple[int, ...]]
"""``(text, start)``: returns the ids of ``text[start:]`` as they are within ``text``."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a conversation.

    Attributes:
        text: its text, special tokens included.
        ids: its token ids.
        ended_text: ``text`` without the special tokens that end an answer; None for a part that no model wrote.
        ended_ids: the number of its ids without these.
    """

    text: str
    ids: tuple[int, ...]
    ended_text: str | None = None
    ended_ids: int = 0

    @property
    def without_end(self) -> Segment:
        """The same without the special tokens that end an answer."""
        if self.ended_text is None:
            return self
        return Segment(self.ended_text, self.ids[: self.ended_ids], self.ended_text, self.ended_ids)


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation as a sequence of segments. Immutable."""

    segments: tuple[Segment, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids of all segments."""
        return tuple(token for segment in self.segments for token in segment.ids)

    @property
    def ids_without_end(self) -> tuple[int, ...]:
        """The token ids without the special tokens that end the last answer."""
        if not self.segments:
            return ()
        return (*Transcript(self.segments[:-1]).ids, *self.segments[-1].without_end.ids)

    @property
    def text(self) -> str:
        """The text of all segments."""
        return "".join(segment.text for segment in self.segments)

    def and_then(self, segment: Segment) -> Transcript:
        """Return the transcript that goes on with ``segment``."""
        return Transcript((*self.segments, segment))

    def continued(self, text: str, encode: Encode) -> tuple[Transcript, str | None]:
        """Return the transcript of a prompt with exactly this ``text``, up to white space around answers.

        Segments whose text the prompt repeats keep their ids; everything after the first other text is encoded. White
        space at both ends of an answer does not count: many templates trim it, and the model has seen its own.

        Returns:
            The transcript, and a description of the first difference from this one; None where the prompt repeats all.
        """
        kept: list[Segment] = []
        at = 0
        for segment in self.segments:
            found = _repeated(segment, text, at)
            if found is None:
                was, now = segment.text, text[at:]
                same = common_length(was, now)
                difference = f"{now[same : same + _EXCERPT]!r} where it had {was[same : same + _EXCERPT]!r}"
                return Transcript((*kept, Segment(text[at:], encode(text, at)))), difference
            part, at = found
            kept.append(part)
        if at < len(text):
            kept.append(Segment(text[at:], encode(text, at)))
        return Transcript(tuple(kept)), None


def _repeated(segment: Segment, text: str, at: int) -> tuple[Segment, int] | None:
    """Return ``segment`` as ``text`` shows it from ``at`` on, and where it ends there; None if it shows another."""
    if text.startswith(segment.text, at):
        return segment, at + len(segment.text)
    if segment.ended_text is None:
        return None
    ended = segment.without_end
    if text.startswith(ended.text, at):
        return ended, at + len(ended.text)
    words = ended.text.strip()
    begin = at + len(text[at:]) - len(text[at:].lstrip())
    if not words or not text.startswith(words, begin):
        return None
    end = begin + len(words)
    return Segment(text[at:end], ended.ids, text[at:end], len(ended.ids)), end


def common_length(a: Sequence[T], b: Sequence[T]) -> int:
    """Return how many first ids, or characters, are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
