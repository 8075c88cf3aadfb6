"""kvtier: attention keys and values that are never computed twice.

The public names are imported when they are first used: ``kvtier store ls`` needs neither torch nor transformers, which
take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvtier.hf.generate.early_lookup import put_stand_in

if TYPE_CHECKING:
    from kvtier.errors import (
        ArchiveError,
        BlockError,
        BudgetError,
        BusyError,
        ChangedError,
        ClosedError,
        ConfigurationError,
        DemoModelError,
        KvtierError,
        PromptError,
        RestoreError,
        ReuseWarning,
        StoreError,
        StoreVersionError,
        StreamError,
        UninstalledError,
        UnknownNameError,
    )
    from kvtier.hf.cache import TieredCache
    from kvtier.hf.chat.conversation import Chat
    from kvtier.hf.demo_model import demo_model
    from kvtier.hf.generate.hook import uninstall
    from kvtier.report import TurnReport
    from kvtier.store import PrefixStore

    __version__: str

__all__ = [
    "ArchiveError",
    "BlockError",
    "BudgetError",
    "BusyError",
    "ChangedError",
    "Chat",
    "ClosedError",
    "ConfigurationError",
    "DemoModelError",
    "KvtierError",
    "PrefixStore",
    "PromptError",
    "RestoreError",
    "ReuseWarning",
    "StoreError",
    "StoreVersionError",
    "StreamError",
    "TieredCache",
    "TurnReport",
    "UninstalledError",
    "UnknownNameError",
    "__version__",
    "demo_model",
    "uninstall",
]

_HOMES = {
    "Chat": "kvtier.hf.chat.conversation",
    "PrefixStore": "kvtier.store",
    "TieredCache": "kvtier.hf.cache",
    "TurnReport": "kvtier.report",
    "demo_model": "kvtier.hf.demo_model",
    "uninstall": "kvtier.hf.generate.hook",
}
_MODULES = ("errors", "progress", "report", "store")
"""Modules of public names that are not imported from here: ``kvtier.progress.ProgressEvent``."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("kvtier")
    elif name in _MODULES:
        value = import_module(f"kvtier.{name}")
    elif name in __all__:
        value = getattr(import_module(_HOMES.get(name, "kvtier.errors")), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


put_stand_in()
