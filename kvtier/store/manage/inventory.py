"""Inventory: the chains of a store, with the bytes of each and the bytes that only it uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType

import numpy as np

from kvtier.errors import UnknownNameError
from kvtier.store.block import Entry
from kvtier.store.chain import BlockId, BlockKind, TokenIds, chain_keys, common_run
from kvtier.store.names import Name, NamedPrefix
from kvtier.store.tiers.stack import TierStack


@dataclass(frozen=True, slots=True)
class Chain:
    """A stored sequence, from its first block to a block without children.

    Attributes:
        key: the key of its last block.
        root: identifies everything else that decides its K and V.
        tokens: its tokens.
        nbytes: bytes of its blocks, shared ones included.
        used_at: Unix time of its last use.
        hits: how often its last block was restored.
        names: the names whose chains contain its last block.
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
    """Numbers of removed blocks and bytes."""

    blocks: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Linked:
    """What a listing reads at once: the blocks of all named chains, and those that have the same parents.

    Attributes:
        entries: of each block, its entry in each tier, as ``entries_of`` returns them.
        names: of each block of a named chain, its names.
        shorter: of each parent of several blocks, those that are shorter than a block of a named chain beside them.
        blocks: identities, of as many as ``_beside`` compares.
    """

    entries: Mapping[str, list[Entry | None]]
    names: Mapping[str, set[str]]
    shorter: Mapping[str, list[str]]
    blocks: Mapping[str, BlockId]


class Inventory:
    """Contents of a store, over all its tiers. Reads only; the view of the disk tier counts where there is one."""

    def __init__(self, tiers: TierStack) -> None:
        self._tiers = tiers
        self._names = tiers.names

    def described_all(self, names: Sequence[tuple[Name, float, float | None]]) -> tuple[NamedPrefix, ...]:
        """Return the details of all names; the entries of their blocks are read at once."""
        by_key: dict[str, set[str]] = {}
        for name, *_ in names:
            for key in (*name.keys, *name.windows):
                by_key.setdefault(key, set()).add(name.name)
        linked = self._read_linked(by_key)
        return tuple(self.described(*each, linked) for each in names)

    def _read_linked(self, names: Mapping[str, set[str]]) -> _Linked:
        """Read the blocks of all named chains; ``names`` has the names of each."""
        of_tiers = self._tiers.linked()
        keys = dict.fromkeys(key for each in (*of_tiers, names) for key in each)
        entries = {key: [each.get(key) for each in of_tiers] for key in keys}
        following: dict[str, list[Entry]] = {}
        for of_block in entries.values():
            if (entry := next(filter(None, of_block), None)) is not None:
                following.setdefault(entry.parent, []).append(entry)
        shorter: dict[str, list[str]] = {}
        compared: set[str] = set()
        for parent, siblings in following.items():
            if len(siblings) > 1:
                named = [entry for entry in siblings if entry.key in names]
                longest = max((entry.tokens for entry in named), default=0)
                shorter[parent] = [entry.key for entry in siblings if entry.tokens < longest]
                compared.update(shorter[parent], (entry.key for entry in named))
        return _Linked(entries, names, shorter, self._tiers.find_all(compared))

    def described(
        self, name: Name, used_at: float, expires_at: float | None, linked: _Linked | None = None
    ) -> NamedPrefix:
        """Return the details of a name."""
        kept: list[Entry] = []
        by_tier = {"host": 0, "disk": 0}
        tokens = 0
        for key in name.keys:
            entry = self._entries_of(key, linked)[0]
            if entry is None:
                break  # blocks in RAM alone may be evicted at any moment: names do not count them
            counted = min(entry.tokens, name.tokens - tokens)
            by_tier["host" if key in self._tiers.host else self._tiers.last.name] += counted
            tokens += counted
            kept.append(entry)
        own = set(self.own([entry.key for entry in kept], {name.name}, linked))
        windows: list[Entry] = []
        for key, beside in zip(reversed(name.windows), reversed(name.keys), strict=False):
            entry = self._entries_of(key, linked)[0]
            if entry is not None:
                windows.append(entry)
                if beside in own and not self._names_of([key], linked) - {name.name}:
                    own.add(key)
        return NamedPrefix(
            name=name.name,
            root=name.root,
            tokens=name.tokens,
            kept_tokens=tokens,
            nbytes=sum(entry.nbytes for entry in (*kept, *windows)),
            own_bytes=sum(entry.nbytes for entry in (*kept, *windows) if entry.key in own),
            tokens_by_tier=MappingProxyType(by_tier),
            created_at=name.created_at,
            used_at=used_at,
            hits=kept[-1].hits if kept else 0,
            pinned=name.pinned,
            expires_at=expires_at,
        )

    def own_together(self, names: Sequence[Name]) -> list[str]:
        """Return the blocks that only the chains of ``names`` use."""
        together = {name.name for name in names}
        gone: dict[str, str] = {}
        for name in names:
            here = self._tiers.find_all(name.keys)
            own = self.own(list(takewhile(here.__contains__, name.keys)), together, gone=gone)
            entries = self._tiers.kept_entries(own)
            for key in own:
                gone.setdefault(key, entries[key].parent if key in entries else "")
        return list(gone)

    def own(
        self,
        keys: Sequence[str],
        names: set[str],
        linked: _Linked | None = None,
        gone: Mapping[str, str] = MappingProxyType({}),
    ) -> list[str]:
        """Return the blocks of the chain ``keys`` that only this chain and ``names`` use.

        The checkpoints and window blocks beside them are part of it, except where other names use them. With
        ``linked``, for listings, window blocks beside shared blocks may lack. ``gone`` (key → parent) are blocks that
        count as removed.
        """
        own: list[str] = []
        for key, after in zip(reversed(keys), [None, *reversed(keys[1:])], strict=False):
            if key in gone:
                own.append(key)
                continue
            entries = self._entries_of(key, linked)
            if not any(entries):
                continue
            is_shared = bool(self._names_of([key], linked) - names)
            is_followed = bool(own) and own[-1] == after
            beside: list[BlockId] = []
            if (linked is None or not is_shared) and self._has_others(entries, after, linked):
                beside = self._beside(key, after, linked)
            unnamed = [each for each in beside if not self._names_of([each.key], linked) - names]
            children = max(entry.children for entry in entries if entry is not None)
            counted = {after, *(each.key for each in beside)}
            children -= sum(parent == key and other not in counted for other, parent in gone.items())
            if is_shared or children > len(beside) + is_followed or len(unnamed) < len(beside):
                own += [each.key for each in unnamed if each.is_window and is_followed]
                break
            own += [*(each.key for each in beside), key]
        else:
            if keys and (first := next(filter(None, self._entries_of(keys[0], linked)), None)) is not None:
                beside = self._beside(first.root, keys[0], linked)
                own += [each.key for each in beside if not self._names_of([each.key], linked) - names]
        return own

    def _entries_of(self, key: str, linked: _Linked | None) -> list[Entry | None]:
        """Return the entry of a block in each tier; first in the tier to whose blocks names refer."""
        known = linked.entries.get(key) if linked is not None else None
        return known if known is not None else self._tiers.entries_of(key)

    def _has_others(self, entries: Sequence[Entry | None], after: str | None, linked: _Linked | None) -> bool:
        """Whether a block with ``entries`` in the tiers has children other than ``after`` in one of them."""
        if after is None:
            return False
        followers = self._entries_of(after, linked)
        return any(
            entry is not None and entry.children > (follower is not None)
            for entry, follower in zip(entries, followers, strict=True)
        )

    def _names_of(self, keys: Sequence[str], linked: _Linked | None) -> set[str]:
        if linked is None:
            return self._names.of_blocks(keys)
        return set[str]().union(*(linked.names.get(key, ()) for key in keys))

    def _beside(self, parent: str, after: str | None, linked: _Linked | None) -> list[BlockId]:
        """Return checkpoints and window blocks after ``parent`` whose ids begin the block ``after``, the next one."""
        if linked is not None and parent not in linked.shorter:
            return []
        block = self._find(after, linked) if after is not None else None
        if block is None:
            return []
        if linked is None:
            begun = list(self._tiers.tails(parent, block.tokens))
            equal = [each for each in (block.checkpoint, block.window) if each.key in self._tiers]
        else:
            shorter = map(linked.blocks.get, linked.shorter[parent])
            begun = [each for each in shorter if each is not None and _begins(each, block)]
            equal = [each for each in (block.checkpoint, block.window) if any(linked.entries.get(each.key, ()))]
        found = {each.key: each for each in begun if not each.is_a(BlockKind.PAGES)}
        found |= {each.key: each for each in equal}
        found.pop(block.key, None)
        return [found[key] for key in sorted(found)]

    def _find(self, key: str, linked: _Linked | None) -> BlockId | None:
        return self._tiers.find(key) if linked is None else linked.blocks.get(key)

    def windows_below(self, root: str, chain: Sequence[str], gone: Container[str]) -> list[str]:
        """Return the keys of window blocks that lower tiers alone may have, beside the blocks ``gone`` of a chain.

        Raises:
            StoreError: a lower tier cannot read now which ids its blocks have.
        """
        found: list[str] = []
        if self._tiers.has_lower:
            for parent, key in zip([root, *chain], chain, strict=False):
                if key in gone:
                    asked = BlockId(key, parent, root, np.empty(0, dtype=np.int64))
                    block = self._tiers.find(key) or self._tiers.find_below(asked)
                    if block is not None and self._tiers.find(block.window.key) is None:
                        found.append(block.window.key)
        return found

    def last_tokens(self, names: Sequence[Name], count: int) -> dict[str, TokenIds]:
        """Return the last ``count`` ids of the chain of each name, by name; fewer where blocks are gone.

        The blocks of all names are read together.
        """
        places = self._last_places(names)
        lasts = self._tiers.find_all(dict.fromkeys(name.keys[places[name.name]] for name in names if name.keys))
        ends = {name.name: last for name in names if name.keys and (last := lasts.get(name.keys[places[name.name]]))}
        ways = self._ways_up(ends, count)
        return {name.name: _last_ids(name, places[name.name], ways.get(name.name, ()), count) for name in names}

    def _last_places(self, names: Sequence[Name]) -> dict[str, int]:
        """Return the place of the last block of each chain that the store has, by name: chains go from their ends."""
        ends = self._tiers.present([name.keys[-1] for name in names if name.keys], below=False)
        cut = [name for name in names if name.keys and name.keys[-1] not in ends]
        here = self._tiers.present(list(dict.fromkeys(key for name in cut for key in name.keys)), below=False)
        places = {name.name: len(name.keys) - 1 for name in names}
        for name in cut:
            places[name.name] = next((i for i in reversed(range(len(name.keys))) if name.keys[i] in here), 0)
        return places

    def tokens_up_from(self, blocks: Mapping[str, BlockId], count: int) -> dict[str, TokenIds]:
        """Return the last ``count`` ids of the chains that end with ``blocks``, each under the key given for it.

        There are fewer where a block is gone.
        """
        return {name: _ids(way)[-count:] if count else _ids(()) for name, way in self._ways_up(blocks, count).items()}

    def _ways_up(self, ends: Mapping[str, BlockId], count: int) -> dict[str, list[BlockId]]:
        """Return each of ``ends`` after the blocks before it that have ``count`` tokens, as far as there are such.

        Blocks at the same distance from the ends are read together.
        """
        ways = {name: [block] for name, block in ends.items()}
        wanted = dict.fromkeys(ends, count)
        while wanted:
            parents = {name: ways[name][0].parent for name in wanted if ways[name][0].parent != ways[name][0].root}
            found = self._tiers.find_all(dict.fromkeys(parents.values()))
            ahead: dict[str, int] = {}
            for name, parent in parents.items():
                block = found.get(parent)
                if block is not None and all(block.key != each.key for each in ways[name]):
                    ways[name].insert(0, block)
                    if len(block.tokens) < wanted[name]:
                        ahead[name] = wanted[name] - len(block.tokens)
            wanted = ahead
        return ways

    def chains(self) -> tuple[Chain, ...]:
        """Return every chain that is not part of a longer one, the last used first.

        The bytes of a window block are those of the block beside it.
        """
        entries = {entry.key: entry for entry in self._tiers.entries()}
        windows = self._windows_beside(entries)
        followed = {entry.parent for entry in entries.values()}
        sums: dict[str, tuple[int, int]] = {}

        def sum_up(key: str) -> tuple[int, int]:
            path = _way_up(key, entries, sums)
            tokens, nbytes = sums.get(entries[path[-1]].parent, (0, 0))
            for each in reversed(path):
                tokens, nbytes = tokens + entries[each].tokens, nbytes + entries[each].nbytes + windows[each]
                sums[each] = tokens, nbytes
            return tokens, nbytes

        by_block = self._names.by_block()
        chains = []
        for entry in entries.values():
            if entry.key in followed or entry.is_window:
                continue
            tokens, nbytes = sum_up(entry.key)
            names = tuple(by_block.get(entry.key, ()))
            chains.append(Chain(entry.key, entry.root, tokens, nbytes, entry.used_at, entry.hits, names))
        return tuple(sorted(chains, key=lambda chain: -chain.used_at))

    def _windows_beside(self, entries: Mapping[str, Entry]) -> Counter[str]:
        """Return the bytes of window blocks, by the key of a block beside each."""
        nbytes: Counter[str] = Counter()
        windows = [entry for entry in entries.values() if entry.is_window]
        found = self._tiers.find_all([entry.key for entry in windows])  # those in lower tiers alone are not asked for
        for entry in windows:
            window = found.get(entry.key)
            if window is not None:
                beside = (BlockId.of(window.root, window.parent, window.tokens), window.checkpoint)
                nbytes[next((each.key for each in beside if each.key in entries), "")] += entry.nbytes
        return nbytes

    def keys_to(self, key_prefix: str) -> tuple[str, list[str], int]:
        """Return root, keys and number of tokens of the chain whose last block's key begins with ``key_prefix``.

        Raises:
            UnknownNameError: no key begins with it, or several do.
        """
        entries = {entry.key: entry for entry in self._tiers.entries()}
        found = [key for key, entry in entries.items() if key.startswith(key_prefix) and not entry.is_window]
        found = found if key_prefix else []
        if len(found) != 1:
            raise UnknownNameError(
                f"{len(found) or 'no'} block{'s have keys' if len(found) > 1 else ' has a key'} that "
                f"begin{'' if len(found) > 1 else 's'} with {key_prefix!r:.80}; chains() lists them"
            )
        keys = _way_up(found[0], entries)
        keys.reverse()
        return entries[keys[0]].root, keys, sum(entries[key].tokens for key in keys)

    def holding(self, tokens: TokenIds) -> list[str]:
        """Return the keys of all blocks of chains that begin with ``tokens``, except blocks that other chains use.

        Chains that are a prefix of ``tokens`` count, too. The deepest blocks come first.
        """
        entries = {entry.key: entry for entry in self._tiers.entries(all_or_nothing=True)}
        following: dict[str, list[str]] = {}
        for entry in entries.values():
            following.setdefault(entry.parent, []).append(entry.key)
        gone: set[str] = set()
        for root in {entry.root for entry in entries.values()}:
            leading = self._walk(root, tokens, entries, following, gone)
            for key, users in reversed(leading):
                if not set(users) - gone:
                    gone.add(key)
        return sorted(gone, key=lambda key: -entries[key].depth_tokens)

    def _walk(
        self, root: str, tokens: TokenIds, entries: Mapping[str, Entry], following: dict[str, list[str]], gone: set[str]
    ) -> list[tuple[str, Sequence[str]]]:
        """Add to ``gone`` the blocks of chains that hold all of ``tokens``; return the blocks before, parents first.

        Each comes with the blocks that use it: those that follow it, or, of a window block, those that begin with its
        ids. Window blocks come before the blocks beside them.
        """
        leading: list[tuple[str, Sequence[str]]] = []
        places: list[tuple[str, int]] = [(root, 0)]
        if self._tiers.has_lower:  # where the beginning of a chain may be lost: its keys follow from the ids
            size = self._tiers.block_size
            whole = chain_keys(root, tokens[: len(tokens) // size * size], size)
            places += [(block.key, (n + 1) * size) for n, block in enumerate(whole) if block.key not in entries]
        seen: set[str] = set()
        while places:
            parent, start = places.pop()
            rest = tokens[start:]
            shared: dict[str, int] = {}  # how many ids each block that is no window block shares with ``rest``
            before: dict[str, int] = {}  # how many ids the blocks have that ``rest`` goes beyond
            windows: dict[str, int] = {}
            for key in following.get(parent, ()):
                if key in seen:
                    continue
                seen.add(key)
                block = self._tiers.find(key) or self._tiers.find_below(entries[key])
                if block is None:
                    continue
                common = common_run(block.tokens, rest)
                if not block.is_window:
                    shared[key] = common
                if common == len(rest):
                    gone.update(self._with_all_below(key, following))
                elif common == len(block.tokens):
                    (windows if block.is_window else before)[key] = common
            leading += [(key, [each for each in shared if shared[each] >= length]) for key, length in windows.items()]
            leading += [(key, following.get(key, ())) for key in before]
            places += [(key, start + length) for key, length in before.items()]
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
        """Return the bytes and the number of blocks, as ``bytes`` and ``blocks``.

        Blocks count even if their removal failed before and lookups no longer find them.
        """
        found = self._tiers.kept_entries(keys).values()
        return Counter(bytes=sum(entry.nbytes for entry in found), blocks=len(found))


def _begins(shorter: BlockId, block: BlockId) -> bool:
    """Whether the ids of ``shorter`` are a proper prefix of those of ``block``."""
    return len(shorter.tokens) < len(block.tokens) and common_run(shorter.tokens, block.tokens) == len(shorter.tokens)


def _ids(blocks: Sequence[BlockId]) -> TokenIds:
    return np.concatenate([np.empty(0, dtype=np.int64), *(block.tokens for block in blocks)])


def _last_ids(name: Name, place: int, way: Sequence[BlockId], count: int) -> TokenIds:
    """Return the last ``count`` ids of a name; ``way`` ends with the block at ``place`` of its chain."""
    ids = _ids(way)
    if way and place == len(name.keys) - 1:  # it may have more tokens than belong to the name
        before = place * len(way[-2].tokens) if len(way) > 1 else 0
        if before or not place:
            ids = ids[: len(ids) - max(0, before + len(way[-1].tokens) - name.tokens)]
    return ids[max(0, len(ids) - count) :]


def _way_up(key: str, entries: Mapping[str, Entry], known: Container[str] = ()) -> list[str]:
    """Return ``key`` and its ancestors, up to ``known`` ones, each once: parents may form a cycle."""
    way: dict[str, None] = {}
    while key in entries and key not in known and key not in way:
        way[key] = None
        key = entries[key].parent
    return list(way)
