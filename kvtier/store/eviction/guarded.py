"""GuardedPolicy: a policy whose mistakes cost an order of eviction, never a turn or a catalog."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from kvtier.store.eviction.base import MOST_NOTE_CHARACTERS, EvictionPolicy, PolicyState, Standing, Usage

_log = logging.getLogger("kvtier.store")
T = TypeVar("T")


class GuardedPolicy:
    """Asks ``policy``. Where it raises, or ranks a block so that tiers cannot keep it, the last use decides.

    The first mistake is warned of. Notes carry the name of the policy that wrote them: those of another are not shown.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.name, self.queues = policy.name, policy.queues
        self.initial: Mapping[str, float] = dict(policy.initial)
        self._policy = policy
        self._mark = f"{policy.name}: "
        self._has_warned = False

    def is_sound(self, state: PolicyState) -> bool:
        """Return whether the policy could have learnt this."""
        return self._ask(lambda: self._policy.is_sound(state), False)

    def standing(self, usage: Usage, state: PolicyState) -> Standing:
        """Rank a block."""

        def rank() -> Standing:
            found = self._policy.standing(self._shown(usage), state)
            is_usable = 0 <= found.queue < self.queues and math.isfinite(found.priority)
            if not is_usable or len(found.note) > MOST_NOTE_CHARACTERS:
                raise ValueError(f"{found!r:.200} cannot be kept")
            return replace(found, note=self._mark + found.note) if found.note else found

        return self._ask(rank, Standing(0, float(state.clock)))

    def lead(self, queue: int, state: PolicyState) -> float:
        """Return what is added to the priorities of ``queue``."""
        found = self._ask(lambda: float(self._policy.lead(queue, state)), 0.0)
        return found if math.isfinite(found) else 0.0

    def evicted(self, usage: Usage, state: PolicyState) -> PolicyState:
        """Return the state after an eviction."""
        return self._ask(lambda: self._checked(self._policy.evicted(self._shown(usage), state)), state)

    def returned(self, ghost: Usage, state: PolicyState) -> PolicyState:
        """Return the state after a block is put again that was evicted lately."""
        return self._ask(lambda: self._checked(self._policy.returned(self._shown(ghost), state)), state)

    def _checked(self, state: PolicyState) -> PolicyState:
        if not isinstance(state, PolicyState) or state.learnt.keys() != self.initial.keys():
            raise TypeError(f"{state!r:.200} is no state of it")
        return state

    def _shown(self, usage: Usage) -> Usage:
        if not usage.note:
            return usage
        is_own = usage.note.startswith(self._mark)
        return replace(usage, note=usage.note.removeprefix(self._mark) if is_own else "")

    def _ask(self, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except Exception as error:  # of a stranger's code
            if not self._has_warned:
                self._has_warned = True
                text = "the eviction policy %r fails (%s: %s); blocks it cannot rank go by their last use"
                _log.warning(text, self.name, type(error).__name__, error)
            return otherwise
