"""ReplacedMethod: a method of some classes with a wrapper around it, and the way back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

Method = Callable[..., Any]


class ReplacedMethod:
    """Wrappers of the method ``name``, one for each class. Thread-safe.

    What a class has got since then, from a test's or another library's patch or from its end, stays as it is: a method
    is only put back where its wrapper still is.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._replaced: dict[type, tuple[Method | None, Method]] = {}
        self._lock = threading.RLock()

    def wrap(self, owner: type, wrap: Callable[[Method], Method]) -> None:
        """Replace the method of ``owner``, its own or inherited, by ``wrap`` of it, unless that was done."""
        with self._lock:
            own = vars(owner).get(self._name)
            found = self._replaced.get(owner)
            if found is not None and own is found[1]:
                return
            wrapper = wrap(own if own is not None else getattr(owner, self._name))
            self._replaced[owner] = own, wrapper
            setattr(owner, self._name, wrapper)

    def restore(self) -> None:
        """Put the methods of all classes back."""
        with self._lock:
            for owner, (own, wrapper) in self._replaced.items():
                if vars(owner).get(self._name) is not wrapper:
                    continue
                if own is not None:
                    setattr(owner, self._name, own)
                else:
                    delattr(owner, self._name)
            self._replaced.clear()
