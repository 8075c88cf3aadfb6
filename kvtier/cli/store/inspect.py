"""The read-only commands: ``ls``, ``show``, ``du`` and ``stats``. None of them makes a store."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from kvtier.cli.store.common import (
    DEFAULT_FOLDER,
    FAILED,
    WRONG_USAGE,
    AsJson,
    Folder,
    chain,
    fail,
    named,
    opened,
    told,
)
from kvtier.cli.store.completion import InsteadOfAName, complete_filter, complete_name
from kvtier.cli.store.listing import (
    CHAIN_COLUMNS,
    FIELDS,
    NAME_COLUMNS,
    Item,
    Order,
    items,
    parse_filter,
    record,
    row,
    sort,
)
from kvtier.cli.store.output import (
    Column,
    Format,
    make_console,
    moment,
    print_facts,
    print_json,
    print_line,
    print_records,
    print_table,
    span,
)
from kvtier.cli.store.preview import Previews
from kvtier.cli.store.roots import RootFile
from kvtier.store import PrefixStore
from kvtier.store.manage.stats import StoreUsage
from kvtier.store.prometheus import exposition
from kvtier.units import size

_SHOWN_TOKENS = 100  # as text, of the beginning and of the end


class StatsFormat(str, Enum):
    """How ``stats`` prints."""

    TABLE = "table"
    JSON = "json"
    PROMETHEUS = "prometheus"


def ls(
    store: Folder = DEFAULT_FOLDER,
    unnamed: Annotated[
        bool, typer.Option("--unnamed", help="List the chains without a name instead, by key, the last used first.")
    ] = False,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            "-f",
            metavar="KEY=VALUE|WORD",
            autocompletion=complete_filter,
            help="Only prefixes that fit; repeat it for more conditions. name=GLOB, model=, root=, text=, "
            "pinned=yes|no, unused-for=30d, larger=1GiB, smaller=; a word is looked for in name, model and text.",
        ),
    ] = None,
    order: Annotated[
        Order | None, typer.Option("--sort", "-s", help="Default: name; with --unnamed: used.", show_choices=True)
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="Reverse the order.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", "-n", metavar="N", min=0, help="Only the first N.")] = None,
    output: Annotated[
        Format, typer.Option("--format", help="table; json, as --json; jsonl and csv, a line for each prefix.")
    ] = Format.TABLE,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only names, or keys, one a line.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the named prefixes, and the size of all others."""
    output = Format.JSON if as_json else output
    if quiet and output is not Format.TABLE:
        fail(WRONG_USAGE, "--quiet prints names alone: pass it without --format and --json")
    with told():
        tests = [parse_filter(text) for text in filters or ()]
    with opened(store) as open_store:
        previews = Previews(open_store)
        found = items(open_store, unnamed=unnamed)
        fitting = [item for item in found if all(test(item, previews) for test in tests)]
        shown = sort(fitting, order or (Order.USED if unnamed else Order.NAME), reverse=reverse)[:limit]
        texts = ["" if quiet else previews.last(item) for item in shown]
        others = None if quiet or unnamed or output in (Format.JSONL, Format.CSV) else open_store.usage()
        folder = str(open_store.path)
    if quiet:
        sys.stdout.writelines(f"{item.label}\n" for item in shown)
        return
    if output is not Format.TABLE:
        records = [record(item, text) for item, text in zip(shown, texts, strict=True)]
        if output is not Format.JSON:
            print_records(records, FIELDS[unnamed], output)
        elif others is None:
            print_json({"store": folder, "chains": records})
        else:
            without = {"chains": others.unnamed_chains, "bytes": others.unnamed_bytes}
            print_json({"store": folder, "names": records, "unnamed": without})
        return
    _print_list(shown, texts, len(found), others)


def _print_list(shown: Sequence[Item], texts: Sequence[str], of: int, others: StoreUsage | None) -> None:
    """Print items ``shown`` of ``of``; ``others`` is the usage of the store for names, and None for chains."""
    console, now = make_console(), time.time()
    rows = [row(item, text, now) for item, text in zip(shown, texts, strict=True)]
    if rows:
        print_table(console, CHAIN_COLUMNS if others is None else NAME_COLUMNS, rows)
    if len(shown) < of:
        print_line(console, f"{len(shown)} of {of} are shown.")
    if others is None:
        if not of:
            print_line(console, "Nothing here is without a name.")
        return
    if rows:
        console.print()
    if chains := others.unnamed_chains:
        without = f"{chains} chain{'' if chains == 1 else 's'} without a name"
        without += f", {size(others.unnamed_bytes)} that no name uses"
        print_line(console, f"{without}; kvtier store ls --unnamed lists them.")
    else:
        print_line(console, "Everything here has a name." if of else "The store is empty.")


def show(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", autocompletion=complete_name, help="The name of the prefix.")
    ] = None,
    key: InsteadOfAName = None,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", min=0, help="How many of its first token ids to show.")
    ] = 16,
    whole_text: Annotated[bool, typer.Option("--text", help="Print its text, and nothing else.")] = False,
    store: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Show one prefix: its size, its model, its text if its tokenizer is known, and its first token ids."""
    if (name is None) == (key is None):
        fail(WRONG_USAGE, "show takes a name, or the key of a chain with --key")
    with opened(store) as open_store:
        if name is not None:
            prefix = named(open_store, name)
            item, ids = Item(prefix, None, RootFile.read(_path(open_store), prefix.root)), open_store.tokens_of(name)
        else:
            found = chain(open_store, key or "")
            item = Item(None, found, RootFile.read(_path(open_store), found.root))
            ids = open_store.tokens_of_chain(found.key)
        previews = Previews(open_store)
        text = previews.lines(item.root, ids) if whole_text else None
        begin = previews.line(item.root, ids[:_SHOWN_TOKENS])
        end = previews.line(item.root, ids[_SHOWN_TOKENS:][-_SHOWN_TOKENS:])
        folder = _path(open_store)
        if whole_text and text is None:
            fail(FAILED, f"no text of {item.label!r:.80} is known: no cache with a tokenizer has used its model")
    first = ids[:tokens].tolist()
    if as_json:
        more = {"first_token_ids": first, "manifest": item.model.manifest, "manifest_problem": item.model.problem}
        texts = {"first_text": begin, "last_text": end or begin} | ({"whole_text": text} if whole_text else {})
        print_json({"store": str(folder), **record(item, end or begin), **texts, **more})
    elif text is not None:
        sys.stdout.write(f"{text}\n")
    else:
        print_facts(make_console(), _facts(item, begin, end, first, more_follow=len(ids) > len(first)))


def _path(store: PrefixStore) -> Path:
    return Path(str(store.path))


def _facts(item: Item, begin: str, end: str, first: Sequence[int], *, more_follow: bool) -> list[tuple[str, str]]:
    """Return what ``show`` tells, a heading and a text each."""
    now, prefix = time.time(), item.prefix
    last_use = ("last use", f"{moment(item.used_at)} ({span(now - item.used_at)} ago)")
    if prefix is None:
        facts = [("key", item.label), ("tokens", str(item.tokens)), ("size", size(item.nbytes)), last_use]
        facts.append(("hits", str(item.hits)))
    else:
        dropped = "" if prefix.kept_tokens == prefix.tokens else f", of which {prefix.kept_tokens} are still kept"
        facts = [
            ("name", prefix.name),
            ("tokens", f"{prefix.tokens}{dropped}"),
            ("size", f"{size(prefix.nbytes)}, of which {size(prefix.own_bytes)} are used by nothing else"),
            ("named", moment(prefix.created_at)),
            last_use,
            ("hits", str(prefix.hits)),
            ("pinned", "yes" if prefix.pinned else "no"),
            ("expires", "never" if prefix.expires_at is None else moment(prefix.expires_at)),
        ]
    facts += item.model.facts
    facts += [(title, text) for title, text in (("begins", begin), ("ends", end)) if text]
    if first:
        facts.append(("token ids", " ".join(map(str, first)) + (" …" if more_follow else "")))
    return facts


def du(store: Folder = DEFAULT_FOLDER, as_json: AsJson = False) -> None:
    """Show the used space by model, and by name, the largest first."""
    with opened(store) as open_store:
        used = open_store.usage()
        names = sorted(open_store.names(), key=lambda each: (-each.own_bytes, -each.nbytes, each.name))
        folder = _path(open_store)
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
        StatsFormat,
        typer.Option("--format", help="table; json, as --json; or prometheus, the text format of its exporters."),
    ] = StatsFormat.TABLE,
    as_json: AsJson = False,
) -> None:
    """Show how much is stored. Cache hits are not in a store: each program counts its own (store.stats())."""
    with opened(store) as open_store:
        found = open_store.stats()
        chains = open_store.chains()
        unnamed = open_store.usage().unnamed_bytes
    if output is StatsFormat.PROMETHEUS and not as_json:
        sys.stdout.write(exposition(found, of_process=False))
        return
    disk = next(tier for tier in found.tiers if tier.tier == "disk")
    if output is StatsFormat.JSON or as_json:
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
