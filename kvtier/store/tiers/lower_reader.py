"""LowerReader: a block of a lower tier, whose errors are those of a store."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kvtier.errors import BlockError, GoneError, UnavailableError
from kvtier.kv.page import Page, PageView
from kvtier.store.block import BlockReader, Landing

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class LowerReader:
    """Reads as ``reader`` does. Damage is told to the tier; any other error means that the block is unavailable.

    Every method but ``close`` raises ``UnavailableError`` when the bytes cannot be read, or were damaged and are gone.

    Args:
        reader: of the tier.
        tier: its name.
        damaged: forgets a damaged block, given by key and error; returns what to raise.
        failed: notes what failed, and how.
    """

    def __init__(
        self,
        reader: BlockReader,
        tier: str,
        damaged: Callable[[str, BlockError], GoneError],
        failed: Callable[..., None],
    ) -> None:
        self.id, self.spec, self.tier = reader.id, reader.spec, tier
        self.is_plain = bool(reader.is_plain)
        self._reader = reader
        self._damaged = damaged
        self._failed = failed

    def page(self, layer: int) -> Page:
        """Return the page of ``layer``."""
        return self._read(self._reader.page, layer)

    def landing(self, layer: int, first: int, last: int, view: PageView, *, check: bool = True) -> Landing:
        """Prepare to put the tokens ``[first, last)`` of the page of ``layer`` into ``view``."""
        return partial(self._read, self._read(self._reader.landing, layer, first, last, view, check=check))

    def states(self) -> torch.Tensor | None:
        """Return the states of a checkpoint."""
        return self._read(self._reader.states)

    def _read(self, read: Callable[..., T], *args: Any, **more: Any) -> T:
        try:
            return read(*args, **more)
        except UnavailableError:
            raise
        except BlockError as error:
            raise self._damaged(self.id.key, error) from error
        except Exception as error:  # of a stranger's code
            self._failed("read", error, warn=False)
            said = f"{type(error).__name__} {error}".rstrip()
            raise UnavailableError(f"the tier {self.tier!r} cannot read a block: {said}") from error

    def detach(self) -> None:
        """Hold no memory for this reader while it stays open."""
        self._read(self._reader.detach)

    def close(self) -> None:
        """Release the lease."""
        try:
            self._reader.close()
        except Exception as error:  # of a stranger's code
            self._failed("close a block", error)
