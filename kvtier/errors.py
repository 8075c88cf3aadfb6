"""The exceptions of kvtier, as one tree.

```text
KvtierError
├── ConfigurationError (ValueError)   an argument is wrong: the message names it and says what to pass
│   └── BudgetError                   device_budget is too small: the message names the smallest that works
├── ClosedError                       a cache or store is used after close()
├── BusyError                         a cache is changed, or asked for a second turn, before its turn has ended
├── PromptError (ValueError)          tokens and mask contradict each other or the content of the cache
│   └── UnannouncedError              a generate() call that kvtier did not see feeds a cache that holds tokens
├── UnknownNameError (KeyError)       the store has no prefix of this name
├── UninstalledError                  a cache is used in generate() after uninstall()
├── DemoModelError                    demo_model() cannot fetch, convert or keep its model: the message says why
├── StreamError                       K and V of a cold layer are lost, or cannot be moved
└── StoreError                        the folder of a store cannot be used
    ├── StoreVersionError             written by a newer kvtier
    ├── ArchiveError                  a file of an exported prefix cannot be written or imported
    ├── ChangedError                  another process has saved or removed a chat since it was read
    └── BlockError                    one block is missing, damaged or not what it claims to be
        ├── UnavailableError          one block cannot be opened or read now; it is not known to be damaged
        │   └── GoneError             it was evicted or rewritten after the lookup
        └── RestoreError              either, detected while a turn was already reading it

ReuseWarning (UserWarning)            nothing is reused, for a reason in the model or the set-up that lasts
```
"""


class KvtierError(Exception):
    """Base of all exceptions of kvtier."""


class ConfigurationError(KvtierError, ValueError):
    """An argument cannot be used; the message names the argument and what to pass instead."""


class BudgetError(ConfigurationError):
    """K and V do not fit into ``device_budget``, however many layers are cold."""


class StreamError(KvtierError):
    """K and V of a cold layer cannot be written, or are lost; the message names the file and the cause."""


class ClosedError(KvtierError):
    """The cache or store was closed."""


class BusyError(KvtierError):
    """Another call is using the cache, and only that call may change it."""


class PromptError(KvtierError, ValueError):
    """Token ids and attention mask contradict each other, or the content of the cache."""


class UnannouncedError(PromptError):
    """A ``generate()`` that kvtier did not see feeds a cache that holds tokens: its answer would be stale."""


class UnknownNameError(KvtierError, KeyError):
    """The store has no prefix of this name."""

    def __str__(self) -> str:  # a KeyError would show the message in quotes
        return str(self.args[0]) if self.args else ""


class UninstalledError(KvtierError):
    """``generate`` is not wrapped any more: the cache cannot know its tokens."""


class DemoModelError(KvtierError):
    """The model of ``demo_model()`` can neither be fetched from the hub nor with pip; the message says what to do."""


class StoreError(KvtierError):
    """The folder of a store cannot be used."""


class StoreVersionError(StoreError):
    """The store was written by a newer version of kvtier."""


class ArchiveError(StoreError):
    """The file of an exported prefix cannot be written or imported; the message names it."""


class ChangedError(StoreError):
    """Another writer has saved or removed a chat since it was read; the message names the chat."""


class BlockError(StoreError):
    """A stored block is missing, damaged, or not what it claims to be."""


class UnavailableError(BlockError):
    """A stored block cannot be opened or read now, for lack of permission, memory, descriptors or a working drive."""


class GoneError(UnavailableError):
    """A stored block was evicted or rewritten after the lookup: a new lookup finds the current blocks."""


class RestoreError(BlockError):
    """A block failed while a turn was already reading it; the turn must start again without that block.

    Before this is raised, the store has discarded a damaged block, or withheld a block that cannot be read now.
    """


class ReuseWarning(UserWarning):
    """Nothing is reused, for a reason that lies in the model or the set-up and lasts. One for each reason."""
