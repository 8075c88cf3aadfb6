"""ChatReport: the report of a chat's turn, with the tokens that its chat template makes the model compute again."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from kvtier.report import TurnReport


@dataclass(frozen=True, slots=True)
class ChatReport(TurnReport):
    """The report of one turn of a chat.

    Attributes:
        lost_tokens: tokens of earlier turns that the chat template rewrote in the prompt of this turn, so that they
            were computed again. Edits of the conversation do not count.
        next_lost_tokens: tokens of this conversation that the next prompt will not show as they are. ``Chat.warm``
            computes what it will show instead.
        lost_reason: the text that the template rewrote, before and after; None when it rewrote nothing. User text.
    """

    lost_tokens: int = 0
    next_lost_tokens: int = 0
    lost_reason: str | None = field(default=None, repr=False)

    def to_dict(self, *, tokens: bool = False) -> dict[str, Any]:
        """Return all fields as JSON types; ``lost_reason``, which is user text, only with ``tokens``."""
        values = TurnReport.to_dict(self, tokens=tokens)
        return values if tokens else {**values, "lost_reason": None}

    def __str__(self) -> str:
        """Return one line without user text."""
        text = TurnReport.__str__(self)
        if self.next_lost_tokens:
            return f"{text}; the chat template rewrites {self.next_lost_tokens:,} tokens in the next prompt"
        if self.lost_tokens:
            return f"{text}; the chat template has rewritten {self.lost_tokens:,} tokens"
        return text


def chat_report(turn: TurnReport, lost_tokens: int, next_lost_tokens: int, lost_reason: str | None) -> ChatReport:
    """Return the report of ``turn`` with what the chat template rewrites."""
    values = {each.name: getattr(turn, each.name) for each in fields(TurnReport)}
    return ChatReport(**values, lost_tokens=lost_tokens, next_lost_tokens=next_lost_tokens, lost_reason=lost_reason)
