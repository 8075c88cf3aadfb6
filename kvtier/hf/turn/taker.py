"""What the hook around ``generate()`` asks of a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel

from kvtier.hf.inputs.continued import ResidentRows
from kvtier.hf.inputs.request import GenerateRequest
from kvtier.report import TurnReport


class TurnTaker(ABC):
    """A cache that takes turns: what the hook asks of it."""

    @property
    @abstractmethod
    def wait_seconds(self) -> float:
        """How long a call waits for one that is using the cache on another thread."""

    @abstractmethod
    def _begin(self, model: PreTrainedModel, request: GenerateRequest) -> TurnReport:
        """Begin a turn of ``model``, whose pages may still be on their way."""

    @abstractmethod
    def begin_without_reuse(self, reason: str) -> None:
        """Begin a turn with empty layers that neither reuses nor is kept."""

    @property
    @abstractmethod
    def has_turn(self) -> bool:
        """Whether a turn has begun that is not committed."""

    @abstractmethod
    def resident(self) -> ResidentRows | None:
        """Return the tokens of the last turn whose K and V the cache holds; None when there are none."""

    @abstractmethod
    def pass_over(self, reason: str) -> None:
        """Note a turn that could neither reuse nor be kept, and hold nothing of it."""

    @abstractmethod
    def _pieces(self) -> Sequence[tuple[int, int]]:
        """Return columns ``(begin, end)`` of the prompt that are to be fed one after the other before the rest."""

    @abstractmethod
    def _passed(self, column: int) -> None:
        """Note that forward passes have ended that gave the model the first ``column`` columns, and no more."""

    @property
    @abstractmethod
    def _has_states(self) -> bool:
        """Whether any layer keeps what is only valid after one token."""

    @abstractmethod
    def _commit(self, sequences: Any, eos_ids: Iterable[int]) -> TurnReport:
        """End the turn: keep prompt and generated tokens; ``sequences`` None keeps the prompt alone.

        Whatever goes wrong, the answer is there: nothing is raised, and nothing is kept then.
        """

    @abstractmethod
    def _salvage(self) -> None:
        """End a turn that was interrupted: keep the part of its prompt that every layer has."""

    @abstractmethod
    def _can_start_again(self) -> bool:
        """Whether the turn began with a known prefix and no forward pass has ended yet: all tokens are known."""

    @abstractmethod
    def get_seq_length(self) -> int:
        """Return the columns held."""

    @abstractmethod
    def start_over(self) -> None:
        """Hold nothing, and forget the turn: the call that it is part of begins it again."""
