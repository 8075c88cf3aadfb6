"""ChatReport: the report of a chat's turn, with the tokens that its chat template makes the model compute again."""

from __future__ import annotations

from dataclasses import dataclass, fields

from kvtier.report import TurnReport


@dataclass(frozen=True, slots=True)
class ChatReport(TurnReport):
    """The report of one turn of a chat.

    Attributes:
        lost_tokens: tokens of earlier turns that the chat template rewrote in the prompt of this turn, so that they
            were computed again. Edits of the conversation do not count.
        next_lost_tokens: tokens of this conversation that the next prompt will not show as they are. ``Chat.warm``
            computes what it will show instead.
        lost_reason: the text that the template rewrote, before and after; None when it rewrote nothing.
    """

    lost_tokens: int = 0
    next_lost_tokens: int = 0
    lost_reason: str | None = None


def chat_report(turn: TurnReport, lost_tokens: int, next_lost_tokens: int, lost_reason: str | None) -> ChatReport:
    """Return the report of ``turn`` with what the chat template rewrites."""
    values = {field.name: getattr(turn, field.name) for field in fields(TurnReport)}
    return ChatReport(**values, lost_tokens=lost_tokens, next_lost_tokens=next_lost_tokens, lost_reason=lost_reason)
