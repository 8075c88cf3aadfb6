"""LowerTier: a tier below the store's own, asked so that no turn fails or waits for long because of it."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

from kvtier.errors import BlockError, ConfigurationError, GoneError, UnavailableError
from kvtier.store.block import Block, BlockReader, Entry
from kvtier.store.chain import BlockId
from kvtier.store.tiers.backoff import Backoff, Withheld
from kvtier.store.tiers.base import Presence, PutResult, Tier, TierStats, close_all, is_asked_for
from kvtier.store.tiers.lower_reader import LowerReader

_log = logging.getLogger("kvtier.store")
T = TypeVar("T")
_LOOKUPS = 5  # the latest, of which the middle one counts
LONGEST_ANSWER_SECONDS = 2.0
"""How long turns wait for a tier. Time that passes without a wait makes up for time that was waited."""


class LowerTier:
    """Asks a tier that may be slow, away, or wrong. What it raises or does not answer in time is unavailable.

    A tier that fails is not asked again for a second; then for two, and so on up to a minute. The first failure is
    warned of, every one is counted. A block that is damaged is forgotten in this tier alone, and is then gone.

    Args:
        tier: what is asked.
        clock: Unix time.
        longest_answer_seconds: how long turns wait for it.
    """

    def __init__(
        self, tier: Tier, clock: Callable[[], float], longest_answer_seconds: float = LONGEST_ANSWER_SECONDS
    ) -> None:
        self.name = tier.name
        self.counts: Counter[str] = Counter()
        self._tier = tier
        self._backoff = Backoff(clock)
        self._failing = ""  # what failed last: only its success ends the pause
        self._withheld = Withheld(clock)
        self._longest_answer_seconds = longest_answer_seconds
        self._allowance_seconds = longest_answer_seconds
        self._waited_until = time.monotonic()
        self._has_warned = False
        self._lookups: deque[float] = deque(maxlen=_LOOKUPS)

    @property
    def lookup_seconds(self) -> float:
        """How long a lookup has taken lately; 0 before the first, and while the tier is not asked."""
        return 0.0 if self._backoff.holds() or not self._lookups else sorted(self._lookups)[len(self._lookups) // 2]

    def _failed(self, what: str, error: BaseException, *, warn: bool = True) -> None:
        self.counts[f"errors.{self.name}"] += 1
        said = str(error).partition("\n")[0] or "no answer in time"
        self._failing = what
        self._backoff.begin(f"{type(error).__name__}: {said}", told=False)
        if warn and not self._has_warned:
            self._has_warned = True
            text = "the tier %r cannot %s (%s: %s); its blocks are recomputed while that lasts"
            _log.warning(text, self.name, what, type(error).__name__, said)

    def _worked(self, what: str) -> None:
        if what == self._failing:
            self._failing = ""
            self._backoff.end()

    def _ask(self, what: str, call: Callable[[], T], otherwise: T) -> T:
        """Return what ``call`` returns; ``otherwise`` if it fails, or a call failed lately."""
        if self._backoff.holds():
            return otherwise
        try:
            answer = call()
        except Exception as error:  # of a stranger's code
            self._failed(what, error)
            return otherwise
        self._worked(what)
        return answer

    def _wait(self, future: Future[T]) -> T:
        """Return the result of ``future``, in what is left of the time that turns wait."""
        began = time.monotonic()
        self._allowance_seconds += began - self._waited_until
        self._allowance_seconds = min(max(0.0, self._allowance_seconds), self._longest_answer_seconds)
        try:
            return future.result(self._allowance_seconds)
        finally:
            self._waited_until = time.monotonic()
            self._allowance_seconds -= self._waited_until - began

    def presence(self, keys: Sequence[str]) -> Sequence[Presence]:
        """Say of each of ``keys``, in order, whether the block can be opened, in bounded time."""
        if not keys:
            return []

        def call() -> Sequence[Presence]:
            began = time.monotonic()
            found = self._wait(self._tier.presence(keys))
            self._lookups.append(time.monotonic() - began)
            if len(found) != len(keys):
                raise ValueError(f"{len(found)} answers about {len(keys)} keys")
            return [
                Presence.UNAVAILABLE if key in self._withheld else each for key, each in zip(keys, found, strict=True)
            ]

        return self._ask("look up", call, [Presence.UNAVAILABLE] * len(keys))

    def withhold(self, keys: Iterable[str]) -> None:
        """Find blocks that could not be read again only after a while."""
        self._withheld.add(keys)

    def open_all(self, blocks: Sequence[BlockId]) -> list[BlockReader | UnavailableError | None]:
        """Open blocks for reading, in bounded time; say of each why it cannot be, None where it is not here."""
        if not blocks:
            return []
        if self._backoff.holds():
            return [UnavailableError(f"the tier {self.name!r} is not asked now: {self._backoff.reason}")] * len(blocks)
        try:
            futures = list(self._tier.open_all(blocks))
            if len(futures) != len(blocks):
                raise ValueError(f"{len(futures)} answers about {len(blocks)} blocks")
        except Exception as error:  # of a stranger's code
            self._failed("open", error, warn=False)  # the store does
            return [UnavailableError(f"the tier {self.name!r} opens nothing: {self._backoff.reason}")] * len(blocks)
        found: list[BlockReader | UnavailableError | None] = []
        failure: Exception | None = None
        try:
            for block, future in zip(blocks, futures, strict=True):
                try:
                    found.append(self._opened(block, future))
                except UnavailableError as error:
                    found.append(error)
                except Exception as error:  # of a stranger's code, or none came in time
                    _let_go(future)
                    failure = failure or error
                    said = f"{type(error).__name__} {error}".rstrip()
                    found.append(UnavailableError(f"the tier {self.name!r} has not opened a block: {said}"))
        except BaseException:
            close_all(found)
            for future in futures[len(found) :]:
                _let_go(future)
            raise
        if failure is None:
            self._worked("open")
        else:
            self._failed("open", failure, warn=False)
        return found

    def _opened(self, block: BlockId, future: Future[BlockReader | None]) -> BlockReader | None:
        try:
            reader = self._wait(future)
        except UnavailableError:
            raise
        except BlockError as error:
            raise self._damaged(block.key, error) from error
        if reader is None:
            return None
        if not is_asked_for(reader.id, block):
            reader.close()
            raise self._damaged(block.key, BlockError(f"block {block.key[:12]} holds other tokens than its key says"))
        return LowerReader(reader, self.name, self._damaged, self._failed)

    def _damaged(self, key: str, error: BlockError) -> GoneError:
        """Forget a damaged block here, where it is damaged; return what to raise."""
        self.counts[f"errors.{self.name}"] += 1
        self.discard_all([key])
        return GoneError(f"the tier {self.name!r} had a damaged block, which was removed there: {error}")

    def put(self, block: Block) -> PutResult:
        """Keep ``block``."""
        return self._ask("keep a block", lambda: self._tier.put(block), PutResult.UNAVAILABLE)

    def touch(self, keys: Sequence[str], hits: Mapping[str, int]) -> None:
        """Note that a turn used these blocks now, and how often blocks were restored."""
        self._ask("note a use", lambda: self._tier.touch(keys, hits), None)

    def flush(self) -> None:
        """Wait until all that was put outlives this process."""
        self._ask("flush", self._tier.flush, None)

    def discard_all(self, keys: Sequence[str]) -> bool:
        """Forget blocks, whatever failed before; return whether the tier was told."""
        try:
            self._tier.discard_all(keys)
        except Exception as error:  # of a stranger's code
            self._failed("forget blocks", error)
            return False
        return True

    def entries(self) -> list[Entry] | None:
        """Return what is known of every block that can be found; None where that cannot be told."""
        return self._ask("list its blocks", lambda: list(self._tier.entries()), None)

    def shrink(self, to_bytes: int) -> None:
        """Evict until all blocks take no more than ``to_bytes``."""
        self._ask("evict", lambda: self._tier.shrink(to_bytes), None)

    def stats(self, hits: int) -> TierStats:
        """Return its numbers; ``hits`` blocks were restored from here."""
        return self._ask("count", lambda: self._tier.stats(hits), TierStats(self.name, hits=hits))

    def close(self) -> None:
        """Let go of threads, connections and files."""
        try:
            self._tier.close()
        except Exception as error:  # of a stranger's code
            self._failed("close", error)


def checked_tiers(tiers: Sequence[Tier]) -> Sequence[Tier]:
    """Return ``tiers`` if a store can have them below its own.

    Raises:
        ConfigurationError: they are no list, or one has no name, or that of another.
    """
    if not isinstance(tiers, (list, tuple)):
        raise ConfigurationError(f"lower_tiers={type(tiers).__name__} must be a list of tiers, also of one.")
    names = [getattr(tier, "name", None) for tier in tiers]
    for tier, name in zip(tiers, names, strict=True):
        if not isinstance(name, str) or name in ("", "device", "host", "disk") or names.count(name) > 1:
            raise ConfigurationError(
                f"lower_tiers: {type(tier).__name__} has the name {name!r:.80}; it needs one of its own, that is not "
                "'device', 'host' or 'disk'. See kvtier.store.tiers.base."
            )
    return tiers


def _let_go(future: Future[BlockReader | None]) -> None:
    """Have a reader that may still come closed when it does."""
    if not future.cancel():
        future.add_done_callback(_close)


def _close(future: Future[BlockReader | None]) -> None:
    if not future.cancelled() and future.exception() is None and (reader := future.result()) is not None:
        reader.close()
