"""kvtier: attention keys and values that are never computed twice."""

from importlib.metadata import version as _version

from kvtier.errors import (
    ArchiveError,
    BlockError,
    BudgetError,
    BusyError,
    ChangedError,
    ClosedError,
    ConfigurationError,
    KvtierError,
    PromptError,
    RestoreError,
    StoreError,
    StoreVersionError,
    StreamError,
    UninstalledError,
    UnknownNameError,
)
from kvtier.hf.cache import TieredCache
from kvtier.hf.chat.conversation import Chat
from kvtier.hf.generate.hook import uninstall
from kvtier.report import TurnReport
from kvtier.store import PrefixStore

__version__ = _version("kvtier")

__all__ = [
    "ArchiveError",
    "BlockError",
    "BudgetError",
    "BusyError",
    "ChangedError",
    "Chat",
    "ClosedError",
    "ConfigurationError",
    "KvtierError",
    "PrefixStore",
    "PromptError",
    "RestoreError",
    "StoreError",
    "StoreVersionError",
    "StreamError",
    "TieredCache",
    "TurnReport",
    "UninstalledError",
    "UnknownNameError",
    "__version__",
    "uninstall",
]
