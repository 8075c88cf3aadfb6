"""A stand-in for ``generate`` until ``TieredCache`` is imported, which ``import kvtier`` puts there.

``import kvtier`` does not import transformers, so ``generate`` is wrapped when ``kvtier.TieredCache`` is first looked
up. In ``model.generate(**inputs, past_key_values=kvtier.TieredCache())`` that is too late: Python has looked up
``model.generate`` before. The stand-in is what it has found, and it calls whatever ``generate`` is by then.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "transformers.generation.utils"
_MARK = "kvtier_stands_in_for"
_calling = threading.local()


def put_stand_in() -> None:
    """Put the stand-in on ``GenerationMixin``, now or when transformers is imported; that is not imported here."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        _cover(module)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def original_of(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that ``generate`` stands in for; ``generate`` itself if it is no stand-in."""
    original: Callable[..., Any] = getattr(generate, "__dict__", {}).get(_MARK, generate)
    return original


class _Watch(MetaPathFinder):
    """Finds the module of ``GenerationMixin`` as the other finders do, and is called back once it is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _cover(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _cover(module: ModuleType) -> None:
    """Put the stand-in on the ``GenerationMixin`` of ``module``, unless it is wrapped already."""
    mixin: Any = getattr(module, "GenerationMixin", None)
    original = getattr(mixin, "generate", None)
    if original is None or "kvtier.hf.cache" in sys.modules:
        return

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = mixin.generate
        if current is generate or getattr(_calling, "stand_in", False):
            return original(self, *args, **kwargs)
        _calling.stand_in = True  # a wrapper of another library around the stand-in comes back here
        try:
            return current(self, *args, **kwargs)
        finally:
            _calling.stand_in = False

    setattr(generate, _MARK, original)
    mixin.generate = generate
