"""TrustedHooks: the hooks that the owner of a cache says change neither K nor V."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvtier.errors import ConfigurationError
from kvtier.hf.identity.code import behind


class TrustedHooks:
    """Hooks, and qualified names of hooks, that leave K and V as they are.

    An object stands for itself alone, a name for all hooks of that name.

    Args:
        given: functions, callable objects, hooks of accelerate, or names as ``"package.module.function"``.

    Raises:
        ConfigurationError: ``given`` is no collection of these.
    """

    def __init__(self, given: Iterable[Any] = ()) -> None:
        if isinstance(given, str) or callable(given) or not isinstance(given, Iterable):
            raise ConfigurationError(f"trusted_hooks={given!r:.80} is no list; pass trusted_hooks=[hook, …].")
        self.given = tuple(given)
        for each in self.given:
            is_hook = callable(each) or hasattr(type(each), "post_forward")
            if not (isinstance(each, str) and each) and not is_hook:
                raise ConfigurationError(
                    f"trusted_hooks contains {each!r:.80}, which is no hook; pass functions that were registered as "
                    'hooks, or their names: "package.module.function".'
                )
        self._names = frozenset(each for each in self.given if isinstance(each, str))

    def cover(self, hook: Any) -> bool:
        """Return whether ``hook`` is one of these."""
        if not self.given:
            return False
        is_given = any(hook is each or _is_same_method(hook, each) for each in self.given)
        return is_given or qualified_name(hook) in self._names


NO_HOOKS = TrustedHooks()


def qualified_name(hook: Any) -> str:
    """Return the module and the qualified name of a function, or of the class of another object."""
    hook = behind(hook)
    named = hook if hasattr(hook, "__qualname__") else type(hook)
    return f"{named.__module__}.{named.__qualname__}"


def _is_same_method(hook: Any, other: Any) -> bool:
    """Whether both are the same method of the same object: each access to a method makes a new object."""
    ours, theirs = getattr(hook, "__self__", None), getattr(other, "__self__", None)
    return ours is not None and ours is theirs and getattr(hook, "__func__", None) is getattr(other, "__func__", 0)
