"""The read-only commands: ``ls``, ``show``, ``du`` and ``stats``. None of them makes a store."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from kvtier.cli.store.common import DEFAULT_FOLDER, AsJson, Folder, named, opened
from kvtier.cli.store.output import (
    Column,
    make_console,
    moment,
    name_record,
    print_facts,
    print_json,
    print_line,
    print_table,
    span,
)
from kvtier.cli.store.roots import RootFile
from kvtier.store.manage.inventory import Chain
from kvtier.store.manage.stats import StoreUsage
from kvtier.store.names import NamedPrefix
from kvtier.store.prometheus import exposition
from kvtier.units import size

_NAME_COLUMNS = (
    Column("name", "left", folds=True),
    Column("tokens"),
    Column("kept", dispensable=3),
    Column("size"),
    Column("own", dispensable=2),
    Column("last use", dispensable=1),
    Column("age", dispensable=6),
    Column("hits", dispensable=5),
    Column("pinned", "left", dispensable=4),
    Column("expires in", dispensable=4),
)
_CHAIN_COLUMNS = (
    Column("key", "left"),
    Column("tokens"),
    Column("size"),
    Column("last use", dispensable=1),
    Column("hits", dispensable=3),
    Column("model", "left", dispensable=2),
)


class Format(str, Enum):
    """How ``stats`` prints."""

    TABLE = "table"
    JSON = "json"
    PROMETHEUS = "prometheus"


def ls(
    store: Folder = DEFAULT_FOLDER,
    unnamed: Annotated[
        bool, typer.Option("--unnamed", help="List what has no name instead, by key, the last used first.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the named prefixes, and the size of all others."""
    with opened(store) as open_store:
        names = open_store.names()
        chains = [chain for chain in open_store.chains() if not chain.names]
        used = open_store.usage()
        folder = str(open_store.path)
    if unnamed:
        _list_chains(Path(folder), chains, as_json)
    elif as_json:
        without = {"chains": len(chains), "bytes": used.unnamed_bytes}
        print_json({"store": folder, "names": [name_record(each) for each in names], "unnamed": without})
    else:
        _list_names(names, chains, used)


def _list_names(names: Sequence[NamedPrefix], chains: Sequence[Chain], used: StoreUsage) -> None:
    console, now = make_console(), time.time()
    if names:
        print_table(console, _NAME_COLUMNS, [_name_row(each, now) for each in names])
        console.print()
    if chains:
        without = f"{len(chains)} chain{'' if len(chains) == 1 else 's'} without a name"
        without += f", {size(used.unnamed_bytes)} that no name uses"
        print_line(console, f"{without}; kvtier store ls --unnamed lists them.")
    elif names:
        print_line(console, "Everything here has a name.")
    else:
        print_line(console, "The store is empty.")


def _name_row(each: NamedPrefix, now: float) -> Sequence[str]:
    return (
        each.name,
        str(each.tokens),
        str(each.kept_tokens),
        size(each.nbytes),
        size(each.own_bytes),
        f"{span(now - each.used_at)} ago",
        span(now - each.created_at),
        str(each.hits),
        "yes" if each.pinned else "",
        "" if each.expires_at is None else span(each.expires_at - now),
    )


def _list_chains(folder: Path, chains: Sequence[Chain], as_json: bool) -> None:
    if as_json:
        records = [
            {
                "key": chain.key,
                "root": chain.root,
                "tokens": chain.tokens,
                "bytes": chain.nbytes,
                "used_unix_seconds": chain.used_at,
                "hits": chain.hits,
                "names": list(chain.names),
            }
            for chain in chains
        ]
        print_json({"store": str(folder), "chains": records})
        return
    console, now = make_console(), time.time()
    if not chains:
        print_line(console, "Nothing here is without a name.")
        return
    titles = {root: RootFile.read(folder, root).title for root in {chain.root for chain in chains}}
    rows = [
        (
            chain.key[:12],
            str(chain.tokens),
            size(chain.nbytes),
            f"{span(now - chain.used_at)} ago",
            str(chain.hits),
            titles[chain.root],
        )
        for chain in chains
    ]
    print_table(console, _CHAIN_COLUMNS, rows)


def show(
    name: Annotated[str, typer.Argument(help="What is to be shown.")],
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="How many of its first token ids to show.")] = 16,
    store: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Show one named prefix: its size, its model, its first token ids."""
    with opened(store) as open_store:
        prefix = named(open_store, name)
        first = [int(token) for token in open_store.tokens_of(name)[:tokens]]
        folder = Path(str(open_store.path))
    file = RootFile.read(folder, prefix.root)
    if as_json:
        more = {"first_token_ids": first, "manifest": file.manifest, "manifest_problem": file.problem}
        print_json({"store": str(folder), **name_record(prefix), **more})
        return
    now = time.time()
    dropped = "" if prefix.kept_tokens == prefix.tokens else f", of which {prefix.kept_tokens} are still kept"
    expires = "never" if prefix.expires_at is None else moment(prefix.expires_at)
    facts = [
        ("name", prefix.name),
        ("tokens", f"{prefix.tokens}{dropped}"),
        ("size", f"{size(prefix.nbytes)}, of which {size(prefix.own_bytes)} are used by nothing else"),
        ("named", moment(prefix.created_at)),
        ("last use", f"{moment(prefix.used_at)} ({span(now - prefix.used_at)} ago)"),
        ("hits", str(prefix.hits)),
        ("pinned", "yes" if prefix.pinned else "no"),
        ("expires", expires),
        *file.facts,
    ]
    if first:
        more_follow = " …" if prefix.kept_tokens > len(first) else ""
        facts.append(("token ids", " ".join(map(str, first)) + more_follow))
    print_facts(make_console(), facts)


def du(store: Folder = DEFAULT_FOLDER, as_json: AsJson = False) -> None:
    """Show the used space by model, and by name, the largest first."""
    with opened(store) as open_store:
        used = open_store.usage()
        names = sorted(open_store.names(), key=lambda each: (-each.own_bytes, -each.nbytes, each.name))
        folder = Path(str(open_store.path))
    files = {root.root: RootFile.read(folder, root.root) for root in used.roots}
    if as_json:
        roots = [
            {
                "root": root.root,
                "title": files[root.root].title,
                "blocks": root.blocks,
                "bytes": root.nbytes,
                "named_bytes": root.named_bytes,
            }
            for root in used.roots
        ]
        by_name = [
            {
                "name": each.name,
                "root": each.root,
                "own_bytes": each.own_bytes,
                "shared_bytes": each.nbytes - each.own_bytes,
            }
            for each in names
        ]
        sums = {"bytes": used.nbytes, "unnamed_bytes": used.unnamed_bytes}
        print_json({"store": str(folder), **sums, "roots": roots, "names": by_name})
        return
    console = make_console()
    if used.roots:
        models = [
            (root.root[:12], files[root.root].title, str(root.blocks), size(root.nbytes), size(root.named_bytes))
            for root in used.roots
        ]
        columns = (
            Column("root", "left", dispensable=1),
            Column("model", "left", folds=True),
            Column("blocks", dispensable=2),
            Column("size"),
            Column("named"),
        )
        print_table(console, columns, models)
        console.print()
    if names:
        rows = [(each.name, size(each.own_bytes), size(each.nbytes - each.own_bytes)) for each in names]
        print_table(console, (Column("name", "left", folds=True), Column("own"), Column("shared")), rows)
        console.print()
    print_line(console, f"{size(used.nbytes)} in all, {size(used.unnamed_bytes)} that no name uses.")


def stats(
    store: Folder = DEFAULT_FOLDER,
    output: Annotated[
        Format,
        typer.Option("--format", help="table; json, as --json; or prometheus, the text format of its exporters."),
    ] = Format.TABLE,
    as_json: AsJson = False,
) -> None:
    """Show how much is stored. Cache hits are counted by each program that uses the store, for itself."""
    with opened(store) as open_store:
        found = open_store.stats()
        chains = open_store.chains()
        unnamed = open_store.usage().unnamed_bytes
    if output is Format.PROMETHEUS and not as_json:
        sys.stdout.write(exposition(found, of_process=False))
        return
    disk = next(tier for tier in found.tiers if tier.tier == "disk")
    if output is Format.JSON or as_json:
        print_json(
            {
                "store": found.path,
                "bytes": disk.nbytes,
                "unnamed_bytes": unnamed,
                "blocks": disk.blocks,
                "pinned_blocks": disk.pinned_blocks,
                "chains": len(chains),
                "names": found.names,
            }
        )
        return
    facts = [
        ("store", str(found.path)),
        ("size", f"{size(disk.nbytes)}, of which {size(unnamed)} are used by no name"),
        ("blocks", str(disk.blocks)),
        ("chains", str(len(chains))),
        ("names", str(found.names)),
    ]
    print_facts(make_console(), facts)
