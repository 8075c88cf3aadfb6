"""PrefixStore: stores prefixes of conversations and finds the longest match, to the token.

A turn *matches* its tokens against the chains of its root (``lookup.py``) and opens the matching blocks. Threads copy
their pages to their places, layer by layer (``load.py``). At its end the turn *commits* its tokens: new blocks are
copied out of the buffers into RAM, and written to the durable tier behind the caller (``commit.py``). A block read from
disk is not copied to RAM: the page cache of the system has it already.

A damaged block is discarded, with one warning, and is a miss from then on. A block that cannot be read now is a miss
for a while, and stays stored.

``manage/admin.py`` handles names, pins, removal and verification.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.util import Finalize
from typing import Any, Concatenate, ParamSpec, TypeVar

from kvtier.costs.book import CostBook
from kvtier.errors import BlockError, ClosedError, ConfigurationError
from kvtier.kv.codecs import BUILT_IN, Codec, Raw, chosen_codec
from kvtier.platform.filesystem import LOCAL, LocalFilesystem, folder_path
from kvtier.platform.fork_safety import Rank, take_part
from kvtier.platform.memory import default_host_budget_bytes
from kvtier.progress import FLUSH, Progress, ProgressEvent, progress_of
from kvtier.store.block import BlockReader, arrived
from kvtier.store.chain import BlockId, TokenIds
from kvtier.store.commit import BlockWriter, Read, States, Windows
from kvtier.store.costs.books import CostBooks
from kvtier.store.costs.codec_choice import CodecChoice
from kvtier.store.eviction.adaptive import Adaptive
from kvtier.store.eviction.base import EvictionPolicy, check_policy
from kvtier.store.eviction.guarded import GuardedPolicy
from kvtier.store.format.vocabulary import Vocabulary
from kvtier.store.manage.admin import StoreAdmin
from kvtier.store.manage.chats import SavedChats
from kvtier.store.manage.stats import StoreStats, store_stats
from kvtier.store.manage.texts import Texts
from kvtier.store.names import checked_ttl
from kvtier.store.reading.back_fetch import BackFetch
from kvtier.store.reading.load import LoadJob, UnusableBlocks, odd_ones, summary
from kvtier.store.reading.lookup import PrefixMatch, Span, checkpoints_of, longest_match, windows_of
from kvtier.store.tiers.base import Tier
from kvtier.store.tiers.disk.catalog.connection import Connect, connect
from kvtier.store.tiers.disk.folder import StoreFolder
from kvtier.store.tiers.disk.tier import DiskTier
from kvtier.store.tiers.disk.writes import DiskSettings
from kvtier.store.tiers.lower import checked_tiers
from kvtier.store.tiers.stack import TierStack
from kvtier.store.write_behind import WriteBehind
from kvtier.transfer.threads import Readers
from kvtier.units import parse_bytes

DEFAULT_BLOCK_SIZE = 256
DEFAULT_DISK_BUDGET = "50GiB"
DEFAULT_FREE_SPACE_FLOOR = "1GiB"
DEFAULT_TAIL_DELAY_SECONDS = 60.0
_A_DAY = 86_400.0
_FETCHING_THREADS = 8  # of tiers with latency: several requests are under way
_EXPIRE_SECONDS = 60.0  # how often expired blocks are deleted; lookups skip them at once


P = ParamSpec("P")
R = TypeVar("R")


def _of_admin(method: Callable[Concatenate[StoreAdmin, P], R]) -> Callable[Concatenate[PrefixStore, P], R]:
    """Return a store method that calls ``method`` on the store's admin."""

    @functools.wraps(method)
    def call(self: PrefixStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(self.admin, *args, **kwargs)

    return call


class PrefixStore:
    """Stores prefixes of conversations in RAM and, given a path, on disk.

    Guarantees: token ids are compared on every hit. RAM and disk stay within their budgets. A failing disk costs a
    warning and a recompute: ``match`` and ``commit`` do not raise for it, ``restore`` raises only ``BlockError``. A
    block being read is not evicted. Thread-safe. Several processes may use one folder at once. Every method but
    ``flush`` and ``close`` raises ``ClosedError`` when the store was closed. Between turns, methods raise
    ``StoreError`` when the disk fails, and ``UnknownNameError`` when the name of a prefix does not exist.

    Attributes:
        lossy_codec: name of the codec of files if it is lossy, else None; a lossy codec is part of every root.

    Args:
        path: folder of the disk tier, created if missing; None keeps everything in RAM, for this process only.
        host_budget: bytes of RAM for blocks, e.g. ``"2GiB"``; by default a quarter of the machine's, at most 4 GiB.
        disk_budget: bytes of files, by default 50 GiB; ignored without ``path``.
        block_size: tokens of a full block.
        compression: ``"raw"``, ``"zstd"`` (about two thirds of the size for 16-bit floats), or ``"auto"``: the one that
            restores faster as far as that was measured, block by block; raw where files come from the page cache or a
            fast drive, and where nothing is known. Pass a custom codec as an object (``kvtier.kv.codecs.base``), in
            every process that reads its files.
        namespace: stores with different namespaces never share a prefix.
        free_space_floor: bytes to leave free on the drive, by default 1 GiB.
        durability: ``"full"``: after ``flush``, written blocks survive a power cut; ``"lazy"``: the system writes data
            back when it chooses, and a power cut may lose blocks, which are then recomputed.
        ttl: seconds from the last use of a block until it expires, unless it is pinned; or a duration, e.g. ``"30d"``;
            None for never.
        policy: decides which blocks are evicted first when there is no room.
        tail_delay: seconds that a conversation is idle before its tail block, which the next turn replaces by a longer
            one, is written to disk; while turns follow each other, at most six times as long. ``flush`` and ``close``
            write it at once. With 0, each turn writes it.
        write_on: ``"first-use"``: new blocks are written to disk; ``"second-use"``: they stay in RAM alone until
            another turn uses them, so that prompts used once are not written. With ``"first-use"``, what a cache of
            ``TieredCache(reuse="auto")`` commits stays in RAM, too, where no turn gains by loading it (see ``flush``).
        lower_tiers: custom tiers below the disk, the nearest first (``kvtier.store.tiers.base``). They keep a copy of
            each full block, and are asked for blocks that RAM and disk lack. The store closes them.
        progress: True: a bar while the catalog is rebuilt from the files, if that takes longer than half a second. Or a
            function that is told: it gets a ``kvtier.progress.ProgressEvent``.
        filesystem: performs all file operations; for tests and unusual drives.
        connect: opens connections to the catalog; for tests.
        clock: Unix time; for tests.

    Raises:
        ConfigurationError: an argument cannot be used.
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        host_budget: int | str | None = None,
        disk_budget: int | str = DEFAULT_DISK_BUDGET,
        block_size: int = DEFAULT_BLOCK_SIZE,
        compression: str | Codec = "auto",
        namespace: str = "",
        free_space_floor: int | str = DEFAULT_FREE_SPACE_FLOOR,
        durability: str = "full",
        ttl: float | str | None = None,
        policy: EvictionPolicy | None = None,
        tail_delay: float = DEFAULT_TAIL_DELAY_SECONDS,
        write_on: str = "first-use",
        lower_tiers: Sequence[Tier] = (),
        progress: bool | Progress | Callable[[ProgressEvent], object] = False,
        filesystem: LocalFilesystem = LOCAL,
        connect: Connect = connect,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
            raise ConfigurationError(f"block_size={block_size!r} must be a whole number of tokens, 1 or more.")
        codec = chosen_codec(compression, "compression", auto=Raw.name)
        if not isinstance(namespace, str):
            raise ConfigurationError(f"namespace={namespace!r} must be a string.")
        if durability not in ("full", "lazy"):
            raise ConfigurationError(f"durability={durability!r} is unknown; pass 'full' or 'lazy'.")
        if write_on not in ("first-use", "second-use"):
            raise ConfigurationError(f"write_on={write_on!r} is unknown; pass 'first-use' or 'second-use'.")
        if isinstance(tail_delay, bool) or not isinstance(tail_delay, (int, float)) or not 0 <= tail_delay < _A_DAY:
            raise ConfigurationError(f"tail_delay={tail_delay!r} must be seconds, 0 or more, and less than a day.")
        ttl_seconds = checked_ttl(ttl)
        host_bytes = default_host_budget_bytes() if host_budget is None else parse_bytes(host_budget, "host_budget")
        self._books = CostBooks(
            lambda root: self._tiers.costs(root), lambda *kept: self._tiers.keep_costs(*kept), clock
        )
        is_chosen = isinstance(compression, str) and compression == "auto"
        settings = DiskSettings(
            budget_bytes=parse_bytes(disk_budget, "disk_budget"),
            codec=codec,
            choose=CodecChoice(self._books.known, DiskTier.name) if is_chosen else None,
            floor_bytes=0 if free_space_floor == 0 else parse_bytes(free_space_floor, "free_space_floor"),
            ttl_seconds=ttl_seconds,
            progress=progress_of(progress),
        )
        self.block_size = block_size
        self.namespace = namespace
        self.lossy_codec = None if codec.is_lossless or path is None else codec.name
        self.path = folder_path(path, "path") if path is not None else None
        self._clock = clock
        guarded = GuardedPolicy(check_policy(policy or Adaptive()))
        codecs = {**BUILT_IN, codec.name: codec}
        folder = StoreFolder(self.path, filesystem, durability == "full", codecs) if self.path is not None else None
        self._behind = WriteBehind(tail_delay, lambda: self._tiers.warn_of_stall())
        lower = checked_tiers(lower_tiers)
        self._tiers: TierStack = TierStack(
            folder,
            host_bytes,
            settings,
            guarded,
            connect,
            clock,
            lower,
            block_size,
            lambda: self._block_writer.hurry(),
            self._books.saved_seconds,
        )
        self._block_writer: BlockWriter = BlockWriter(
            self._tiers,
            self._behind,
            on_second_use=write_on == "second-use",
            is_loaded_too_slowly=partial(self._books.is_loaded_too_slowly, DiskTier.name),
        )
        self._texts = Texts(folder, self._behind.submit)
        self.admin = StoreAdmin(
            self.path, self._tiers, self._block_writer, self._texts, self.flush, self._check_open, clock
        )
        self._reading, self._fetching = Readers(), Readers(_FETCHING_THREADS)
        self._expire_at = clock() + _EXPIRE_SECONDS
        self._tally: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._unusable = UnusableBlocks(self._tiers, self._tally, self._lock)
        self._closed = False
        _open_stores.add(self)
        take_part(self, Rank.STORE)

    def before_fork(self) -> None:
        """Wait until no thread changes anything."""
        self._lock.acquire()
        try:
            self._books.lock.acquire()
        except BaseException:  # an interrupt: the fork is called off
            self._lock.release()
            raise

    def after_fork(self, in_child: bool) -> None:
        """Release the lock; a child gets its own threads and an empty queue, since the parent runs its own tasks."""
        if in_child:
            self._reading, self._fetching = Readers(), Readers(_FETCHING_THREADS)
            self._behind.begin_anew()
        self._books.lock.release()
        self._lock.release()

    def __reduce__(self) -> Any:
        """Refuse to be pickled.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a PrefixStore cannot be pickled or copied: it holds locks and files. Open its folder in the other "
            "process, PrefixStore(folder)"
        )

    def __repr__(self) -> str:
        """Return the place of the store, and what tells its blocks from those of others."""
        space = f", namespace={self.namespace!r}" if self.namespace else ""
        place = f"in {str(self.path)!r}" if self.path is not None else "in RAM"
        return f"<PrefixStore {place}, block_size={self.block_size}{space}{', closed' if self._closed else ''}>"

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the store was closed; make a new PrefixStore (or TieredCache) to use its folder again")

    def _count(self, what: str, n: int = 1) -> None:
        with self._lock:
            self._tally[what] += n

    # --- a turn -----------------------------------------------------------------------------------------------------

    def match(
        self, root: str, tokens: TokenIds, limit: int | None = None, *, below: Callable[[int], bool] | None = None
    ) -> PrefixMatch:
        """Return the longest stored prefix of ``tokens``, to the token, of at most ``limit`` tokens.

        ``below`` is told how many tokens the store's own tiers have, and says whether custom tiers below are asked;
        None asks all tiers at once.
        """
        self._check_open()
        self.admin.forget_what_is_due()
        limit = len(tokens) if limit is None else min(limit, len(tokens))
        in_steps = self._tiers.has_lower and below is not None
        match = longest_match(self._tiers, root, tokens, limit, self.block_size, below=not in_steps)
        if below is not None and in_steps and match.length < limit and below(match.length):
            match = longest_match(self._tiers, root, tokens, limit, self.block_size)
        with self._lock:
            self._tally.update(lookups=1, lookup_tokens=len(tokens), hit_tokens=match.length)
            if match.length < limit:
                reason = "unknown" if not match.length else "diverged" if match.divergence else "shorter"
                self._tally[f"misses.{reason}"] += 1
        return match

    def checkpoints(self, root: str, tokens: TokenIds, limit: int) -> Iterator[tuple[int, BlockId]]:
        """Yield the stored checkpoints of prefixes of ``tokens`` of at most ``limit`` tokens, the longest first.

        Each comes with the number of tokens after which its states are valid. With ``limit`` at ``len(tokens)``, a
        checkpoint of all tokens is found only if a full block ends there.
        """
        self._check_open()
        return checkpoints_of(self._tiers, root, tokens, limit, self.block_size)

    def windows(self, root: str, tokens: TokenIds, match: PrefixMatch) -> tuple[Span, ...]:
        """Return the stored window blocks of the matched tokens, in order and cut to the length of ``match``.

        A window block has K and V of layers with sliding attention for some tokens. There may be holes between the
        spans. A prompt can go on after ``c`` tokens if they cover the last ``window - 1`` tokens before, or all ``c``.

        Args:
            root: the root of ``match``.
            tokens: the ids of ``match``.
            match: the result of ``match`` for them.
        """
        self._check_open()
        return windows_of(self._tiers, root, tokens, match, self.block_size)

    def restore(
        self,
        rows: Sequence[Sequence[Span]],
        checkpoints: Sequence[BlockId] = (),
        windows: Sequence[Sequence[Span]] = (),
    ) -> LoadJob:
        """Open blocks; ``LoadJob.start`` then copies their pages.

        At least one block is required.

        Args:
            rows: the spans of each row.
            checkpoints: one block for each row; only its states are read. Empty for models without states.
            windows: the spans of window blocks of each row, which hold the layers that the blocks of ``rows`` lack.
                Empty for models without sliding layers.

        Raises:
            BlockError: blocks cannot be used. All of them were found in this one call: damaged blocks are discarded,
                and blocks that cannot be read now are withheld. A new ``match`` finds the remaining blocks, and one
                ``commit`` stores the lost blocks again.
        """
        self._check_open()
        blocks = {span.block.key: span.block for spans in rows for span in spans}
        blocks |= {checkpoint.key: checkpoint for checkpoint in checkpoints}
        of_windows = {span.block.key: span.block for spans in windows for span in spans}
        readers: dict[str, BlockReader] = {}
        missing: dict[str, BlockError] = {}
        unusable: dict[str, BlockError] = {}
        try:
            for key, found in self._tiers.open_all([*blocks.values(), *of_windows.values()]).items():
                if found is None:  # evicted since it was matched
                    missing[key] = BlockError(f"block {key[:12]} is gone")
                    self._count("misses.gone")
                elif isinstance(found, BlockError):
                    missing[key] = unusable[key] = found
                else:
                    readers[key] = found
            if not missing:
                odd = odd_ones(readers, of_windows)
                missing = unusable = dict.fromkeys(
                    odd, BlockError("its layers differ from those of the blocks beside it")
                )
            self._unusable.note(unusable)
            if missing:
                raise BlockError(summary(missing)) from next(iter(missing.values()))
        except BaseException:
            for reader in readers.values():
                reader.close()
            raise
        self._block_writer.hit(list(readers))
        with self._lock:
            self._tally.update(f"hits.{reader.tier}" for reader in readers.values())
        keys = [checkpoint.key for checkpoint in checkpoints]
        return LoadJob(rows, readers, self._reading, self._unusable.note, keys, windows)

    def fetch_from_the_back(self, job: LoadJob) -> BackFetch:
        """Start to read the blocks of ``job`` into memory, the last ones first."""
        return BackFetch(job, self._fetching)

    def commit(
        self,
        root: str,
        tokens: TokenIds,
        read: Read,
        manifest: Mapping[str, Any] | None = None,
        states: States | None = None,
        arrive: Callable[[], None] = arrived,
        windows: Windows | None = None,
        *,
        weighs: bool = False,
    ) -> int:
        """Store the K and V of ``tokens``; only new blocks are read.

        Args:
            root: identifies everything else that decides K and V.
            tokens: the ids of one sequence, padding removed.
            read: returns host copies of the pages of all layers for tokens ``[start, stop)``; the store owns them.
            manifest: description of ``root``, written beside the blocks.
            states: for a model with states: the states to store, by the number of tokens after which they are valid.
                Tokens after the last full block that have no states are not stored: no turn could continue from there.
                None for models without states.
            arrive: blocks until the pages hold their bytes. Raises ``UnavailableError`` if they do not come. By default
                they hold them when ``read`` returns.
            windows: for a model with sliding layers, whose pages from ``read`` are empty: their K and V, for some
                tokens. Blocks, and checkpoints, whose tokens lie within one span get a window block beside them.
            weighs: whether turns compute what takes much longer to load. New blocks of such sequences stay in RAM then,
                as ``flush`` says.

        Returns:
            The number of newly stored tokens. Window blocks do not count.
        """
        self._check_open()
        _drain_at_the_end()
        self._books.weigh(root)
        new = self._block_writer.commit(
            root, tokens, read, manifest, self.block_size, states, windows=windows, arrive=arrive, weighs=weighs
        )
        self._count("committed_tokens", new)
        if self._clock() >= self._expire_at:
            self._expire_at = self._clock() + _EXPIRE_SECONDS
            self._tiers.host.expire()
            if self._tiers.is_durable:
                self._behind.submit(self._expire_below)
        if self._tiers.is_durable and self._books.due():
            self._behind.submit(self._books.save)
        return new

    def costs(self, root: str, machine: str) -> CostBook:
        """Return what computing and loading cost the model of ``root`` on ``machine``, as far as it was measured.

        The durable tier keeps it for other processes, from the next commits on and when the store is closed.
        """
        self._check_open()
        return self._books.book(root, machine)

    def lacks_vocabulary(self, root: str) -> bool:
        """Whether there is no whole vocabulary beside ``root`` yet, and this process has tried to keep none."""
        return not self._closed and self._texts.lacks(root)

    def keep_vocabulary(self, root: str, make: Callable[[], Vocabulary]) -> None:
        """Keep the vocabulary that ``make`` returns beside ``root``, so that its prefixes can be shown as text.

        ``make`` is called behind the caller. A store in RAM keeps none. A failure costs a line in the log.
        """
        self._check_open()
        self._texts.keep(root, make)

    def lookup_below(self) -> tuple[str, float] | None:
        """Return the name of the first tier below, and how long lookups there take; None where there is none."""
        self._check_open()
        return self._tiers.lookup_below()

    def where(self, spans: Iterable[Span]) -> Mapping[str, str]:
        """Return the tier that each block of ``spans`` would be read from, by key; no block is opened."""
        self._check_open()
        return self._tiers.where(list(dict.fromkeys(span.block.key for span in spans)))

    def _expire_below(self) -> None:
        self._tiers.last.expire()
        self._tiers.database.finish_overwriting()

    def flush(self, *, progress: bool | Progress | Callable[[ProgressEvent], object] = False) -> None:
        """Wait until all committed blocks are on disk, except those that stay in RAM.

        In RAM stay, while there is room:

        - with ``write_on="second-use"``, blocks that wait for their second use;
        - blocks of sequences that a cache of ``TieredCache(reuse="auto")`` committed, and that no turn gains by
          loading: at least three timed loads say that it takes ten times as long as computing, here and now. They are
          counted as ``stats().not_worth_writing``. Files that exist stay, and are loaded where that pays.

        A named or pinned prefix is on disk after ``flush`` in any case, as far as it was in RAM when it was named.

        Args:
            progress: True: a bar, if this takes longer than half a second. Or a function that is told: it gets a
                ``kvtier.progress.ProgressEvent`` with the bytes of K and V that were written, and that were queued.

        Raises:
            ConfigurationError: ``progress`` is neither.
        """
        told, nbytes = progress_of(progress), self._behind.queued_bytes
        if told is None or not nbytes:
            self._behind.flush()
            self._tiers.flush_below()
            return
        task = told.begin(FLUSH, nbytes, "bytes")
        is_complete = False
        try:
            self._behind.flush(task.to)
            self._tiers.flush_below()
            is_complete = True
        finally:
            task.end(complete=is_complete)

    def stats(self) -> StoreStats:
        """Return the contents of the store in numbers, and its counts since it was opened."""
        self._check_open()
        with self._lock:
            tally = Counter(self._tally)
        tally["not_worth_writing"] = self._block_writer.not_worth_writing
        return store_stats(self.path, self._tiers, tally, self._behind.queued)

    # --- between turns ----------------------------------------------------------------------------------------------

    @property
    def chats(self) -> SavedChats:
        """The conversations that were saved under names; they are renamed, exported and forgotten with their names."""
        return self.admin.chats

    name = _of_admin(StoreAdmin.name)
    names = _of_admin(StoreAdmin.names)
    named = _of_admin(StoreAdmin.named)
    name_chain = _of_admin(StoreAdmin.name_chain)
    rename = _of_admin(StoreAdmin.rename)
    unname = _of_admin(StoreAdmin.unname)
    pin = _of_admin(StoreAdmin.pin)
    unpin = _of_admin(StoreAdmin.unpin)
    chains = _of_admin(StoreAdmin.chains)
    tokens_of = _of_admin(StoreAdmin.tokens_of)
    tokens_of_chain = _of_admin(StoreAdmin.tokens_of_chain)
    vocabulary = _of_admin(StoreAdmin.vocabulary)
    usage = _of_admin(StoreAdmin.usage)
    forget = _of_admin(StoreAdmin.forget)
    forget_chain = _of_admin(StoreAdmin.forget_chain)
    prune = _of_admin(StoreAdmin.prune)
    clear = _of_admin(StoreAdmin.clear)
    would_forget = _of_admin(StoreAdmin.would_forget)
    would_forget_chain = _of_admin(StoreAdmin.would_forget_chain)
    would_prune = _of_admin(StoreAdmin.would_prune)
    export = _of_admin(StoreAdmin.export)
    import_ = _of_admin(StoreAdmin.import_)
    verify = _of_admin(StoreAdmin.verify)

    # --- resources --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Write all queued blocks, then release threads and files. May be called more than once."""
        if self._closed:
            return
        self._closed = True
        self._fetching.close()  # first: what still comes tells how slow a tier is
        if self._tiers.is_durable:
            self._behind.submit(partial(self._books.save, all_news=True))
        self._behind.close()
        self._reading.close()
        self._tiers.close()

    def __enter__(self) -> PrefixStore:
        self._check_open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_open_stores: weakref.WeakSet[PrefixStore] = weakref.WeakSet()
_drained_at_the_end = 0  # id of the process that has called Finalize


@atexit.register
def _drain_open_stores() -> None:
    for store in list(_open_stores):
        store.close()


def _drain_at_the_end() -> None:
    """Register the draining of stores at process exit: some children of multiprocessing skip ``atexit``."""
    global _drained_at_the_end
    if _drained_at_the_end != os.getpid():
        Finalize(None, _drain_open_stores, exitpriority=0)
        _drained_at_the_end = os.getpid()
