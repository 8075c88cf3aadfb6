"""The inventory: chains as their owner sees them, with what each takes and what only it uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kvtier.errors import UnknownNameError
from kvtier.store.block import Entry
from kvtier.store.chain import BlockId, TokenIds, common_run
from kvtier.store.names import Name, NamedPrefix
from kvtier.store.tiers.disk.names import Names
from kvtier.store.tiers.disk.tier import DiskTier
from kvtier.store.tiers.host.tier import HostTier


@dataclass(frozen=True, slots=True)
class Chain:
    """A sequence that the store has, from its first block to one that no other follows.

    Attributes:
        key: the key of its last block.
        root: what else decides its K and V.
        tokens: its tokens.
        nbytes: what its blocks take, those included that other chains use too.
        used_at: Unix time of its last use.
        hits: how often its last block was restored.
        names: the names whose chains have its last block.
    """

    key: str
    root: str
    tokens: int
    nbytes: int
    used_at: float
    hits: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was removed."""

    blocks: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Linked:
    """What all names are about: the rows of their blocks, and the names of each block."""

    entries: Mapping[str, Entry]
    names: Mapping[str, set[str]]


class Inventory:
    """What a store has, over all its tiers. Reads only; the disk tier's view counts where there is one."""

    def __init__(self, host: HostTier, disk: DiskTier | None, names: Names) -> None:
        self._host = host
        self._disk = disk
        self._names = names

    def entry(self, key: str) -> Entry | None:
        """Return what is known of a block: on disk or, while it is not written yet, in RAM."""
        return self._entry_on_disk(key, None) or self._host.entry(key)

    def _entry_on_disk(self, key: str, linked: _Linked | None) -> Entry | None:
        if self._disk is None:
            return None
        return self._disk.entry(key) if linked is None else linked.entries.get(key)

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a block."""
        found = self._host.find(key)
        if found is None and self._disk is not None:
            disk = self._disk
            found = disk.ask(lambda: disk.catalog.find(key), None)
        return found

    # --- chains -----------------------------------------------------------------------------------------------------

    def described_all(self, names: Sequence[tuple[Name, float, float | None]]) -> tuple[NamedPrefix, ...]:
        """Return what is known of all names there are; the rows of their blocks are asked for at once."""
        by_key: dict[str, set[str]] = {}
        for name, *_ in names:
            for key in name.keys:
                by_key.setdefault(key, set()).add(name.name)
        disk, nothing = self._disk, list[Entry]()
        entries = [] if disk is None else disk.ask(disk.catalog.linked_entries, nothing)
        linked = _Linked({entry.key: entry for entry in entries}, by_key)
        return tuple(self._described(*each, linked) for each in names)

    def described(self, name: Name, used_at: float, expires_at: float | None) -> NamedPrefix:
        """Return what is known of a name."""
        return self._described(name, used_at, expires_at, None)

    def _described(self, name: Name, used_at: float, expires_at: float | None, linked: _Linked | None) -> NamedPrefix:
        kept: list[Entry] = []
        by_tier = {"host": 0, "disk": 0}
        tokens = 0
        for key in name.keys:
            entry = self._host.entry(key) if self._disk is None else self._entry_on_disk(key, linked)
            if entry is None:
                break  # what is in RAM alone may go at any moment: no name holds on to it
            counted = min(entry.tokens, name.tokens - tokens)
            by_tier["host" if key in self._host else "disk"] += counted
            tokens += counted
            kept.append(entry)
        own = set(self._own([entry.key for entry in kept], {name.name}, linked))
        return NamedPrefix(
            name=name.name,
            root=name.root,
            tokens=name.tokens,
            kept_tokens=tokens,
            nbytes=sum(entry.nbytes for entry in kept),
            own_bytes=sum(entry.nbytes for entry in kept if entry.key in own),
            tokens_by_tier=MappingProxyType(by_tier),
            created_at=name.created_at,
            used_at=used_at,
            hits=kept[-1].hits if kept else 0,
            pinned=name.pinned,
            expires_at=expires_at,
        )

    def own(self, keys: Sequence[str], names: set[str]) -> list[str]:
        """Return which of the blocks ``keys``, in order of a chain, nothing uses but this chain and ``names``."""
        return self._own(keys, names, None)

    def _own(self, keys: Sequence[str], names: set[str], linked: _Linked | None) -> list[str]:
        own: list[str] = []
        for key, after in zip(reversed(keys), [None, *reversed(keys[1:])], strict=False):
            on_disk, in_ram = self._entry_on_disk(key, linked), self._host.entry(key)
            if on_disk is None and in_ram is None:
                continue
            if self._names_of([key], linked) - names:
                break
            is_followed = bool(own) and own[-1] == after
            beside: list[str] = []
            if self._has_others(on_disk, in_ram, after, linked):
                beside = self._snapshots_on_the_way(key, after)
            children = max(entry.children for entry in (on_disk, in_ram) if entry is not None)
            if children > len(beside) + is_followed or self._names_of(beside, linked) - names:
                break
            own += [*beside, key]
        else:
            if keys and (first := self.find(keys[0])) is not None:
                own += self._snapshots_on_the_way(first.root, keys[0])
        return own

    def _has_others(
        self, on_disk: Entry | None, in_ram: Entry | None, after: str | None, linked: _Linked | None
    ) -> bool:
        """Whether a block, of which the tiers know this, is followed in one of them by others than ``after``."""
        if after is None:
            return False
        is_after_on_disk = on_disk is not None and self._entry_on_disk(after, linked) is not None
        return (on_disk is not None and on_disk.children > is_after_on_disk) or (
            in_ram is not None and in_ram.children > (after in self._host)
        )

    def _names_of(self, keys: Sequence[str], linked: _Linked | None) -> set[str]:
        if linked is None:
            return self._names.of_blocks(keys)
        return set[str]().union(*(linked.names.get(key, ()) for key in keys))

    def _snapshots_on_the_way(self, parent: str, after: str | None) -> list[str]:
        """Return the snapshots after ``parent`` that ``after``, the next block of a chain, begins with."""
        block = self.find(after) if after is not None else None
        if block is None:
            return []
        tiers = (self._host, self._disk) if self._disk is not None else (self._host,)
        tails = (tail for tier in tiers for tail in tier.tails(parent, block.tokens))
        found = {tail.key for tail in tails if tail.is_checkpoint}
        whole = BlockId.of(block.root, block.parent, block.tokens, snapshot=True)
        if any(whole.key in tier for tier in tiers):
            found.add(whole.key)
        return sorted(found - {block.key})

    def chains(self) -> tuple[Chain, ...]:
        """Return every chain that no other goes beyond, the last used first."""
        entries = {entry.key: entry for entry in self.entries()}
        followed = {entry.parent for entry in entries.values()}
        sums: dict[str, tuple[int, int]] = {}

        def sum_up(key: str) -> tuple[int, int]:
            path = _way_up(key, entries, sums)
            tokens, nbytes = sums.get(entries[path[-1]].parent, (0, 0))
            for each in reversed(path):
                tokens, nbytes = tokens + entries[each].tokens, nbytes + entries[each].nbytes
                sums[each] = tokens, nbytes
            return tokens, nbytes

        chains = []
        for entry in entries.values():
            if entry.key in followed:
                continue
            tokens, nbytes = sum_up(entry.key)
            names = tuple(sorted(self._names.of_blocks([entry.key])))
            chains.append(Chain(entry.key, entry.root, tokens, nbytes, entry.used_at, entry.hits, names))
        return tuple(sorted(chains, key=lambda chain: -chain.used_at))

    def entries(self) -> Iterable[Entry]:
        """Return what is known of every block."""
        in_ram = {entry.key: entry for entry in self._host.entries()}
        if self._disk is not None:
            disk = self._disk
            nothing: list[Entry] = []
            on_disk = disk.ask(disk.catalog.entries, nothing)
            in_ram.update((entry.key, entry) for entry in on_disk)
        return in_ram.values()

    def keys_to(self, key_prefix: str) -> tuple[str, list[str], int]:
        """Return root, keys and tokens of the chain whose last block's key begins with ``key_prefix``.

        Raises:
            UnknownNameError: no key begins so, or several do.
        """
        entries = {entry.key: entry for entry in self.entries()}
        found = [key for key in entries if key.startswith(key_prefix)] if key_prefix else []
        if len(found) != 1:
            raise UnknownNameError(
                f"{len(found) or 'no'} block{'s have keys' if len(found) > 1 else ' has a key'} that "
                f"begin{'' if len(found) > 1 else 's'} with {key_prefix!r:.80}; chains() lists them"
            )
        keys = _way_up(found[0], entries)
        keys.reverse()
        return entries[keys[0]].root, keys, sum(entries[key].tokens for key in keys)

    # --- what contains given ids ------------------------------------------------------------------------------------

    def holding(self, tokens: TokenIds) -> list[str]:
        """Return the keys of all blocks that begin with ``tokens`` or go beyond, and of those that only lead there.

        What ``tokens`` begin with counts as leading there, too.
        """
        entries = {entry.key: entry for entry in self.entries()}
        following: dict[str, list[str]] = {}
        for entry in entries.values():
            following.setdefault(entry.parent, []).append(entry.key)
        gone: set[str] = set()
        for root in {entry.root for entry in entries.values()}:
            leading = self._walk(root, tokens, following, gone)
            for key in reversed(leading):
                if not set(following.get(key, ())) - gone:
                    gone.add(key)
        return sorted(gone, key=lambda key: -entries[key].depth_tokens)

    def _walk(self, root: str, tokens: TokenIds, following: dict[str, list[str]], gone: set[str]) -> list[str]:
        """Add to ``gone`` what holds all of ``tokens``; return what leads there, parents first."""
        leading: list[str] = []
        places: list[tuple[str, int]] = [(root, 0)]
        seen: set[str] = set()
        while places:
            parent, start = places.pop()
            rest = tokens[start:]
            for key in following.get(parent, ()):
                block = self.find(key) if key not in seen else None
                seen.add(key)
                if block is None:
                    continue
                shared = common_run(block.tokens, rest)
                if shared == len(rest):
                    gone.update(self._with_all_below(key, following))
                elif shared == len(block.tokens):
                    leading.append(key)
                    places.append((key, start + shared))
        return leading

    @staticmethod
    def _with_all_below(key: str, following: dict[str, list[str]]) -> set[str]:
        found, ahead = {key}, [key]
        while ahead:
            children = set(following.get(ahead.pop(), ())) - found
            found |= children
            ahead += children
        return found

    def nbytes(self, keys: Iterable[str]) -> Counter[str]:
        """Return what blocks take, and how many of them there are, as ``bytes`` and ``blocks``.

        Those count too that no turn finds any more, since they could not be removed before.
        """
        found = [entry for entry in map(self._kept, keys) if entry is not None]
        return Counter(bytes=sum(entry.nbytes for entry in found), blocks=len(found))

    def _kept(self, key: str) -> Entry | None:
        disk = self._disk
        on_disk = disk.ask(lambda: disk.catalog.entry(key), None) if disk is not None else None
        return on_disk or self._host.entry(key)


def _way_up(key: str, entries: Mapping[str, Entry], known: Container[str] = ()) -> list[str]:
    """Return ``key`` and the blocks before it, up to ``known`` ones, each once: parents may form a cycle."""
    way: dict[str, None] = {}
    while key in entries and key not in known and key not in way:
        way[key] = None
        key = entries[key].parent
    return list(way)
