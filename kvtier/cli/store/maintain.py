"""The commands that delete, after asking: ``rm``, ``prune``, ``clear``, ``verify --repair``. ``verify`` only checks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from kvtier.cli.store.common import (
    DEFAULT_FOLDER,
    FAILED,
    WRONG_USAGE,
    AsJson,
    DryRun,
    Folder,
    Yes,
    chain,
    confirm,
    fail,
    named,
    opened,
    progress_bar,
    spinner,
    told,
)
from kvtier.cli.store.completion import InsteadOfAName, complete_name
from kvtier.cli.store.output import (
    Column,
    make_console,
    parse_size,
    plain,
    print_json,
    print_line,
    print_result,
    print_table,
)
from kvtier.store import PrefixStore
from kvtier.store.manage.inventory import Forgotten
from kvtier.store.manage.verify import Problem, VerifyReport
from kvtier.units import parse_seconds, size


def rm(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", autocompletion=complete_name, help="The names of prefixes."),
    ] = None,
    key: InsteadOfAName = None,
    name_only: Annotated[
        bool, typer.Option("--name-only", help="Remove the names alone; the prefixes stay until they are evicted.")
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    store: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Forget prefixes for good, except for blocks that other sequences use too."""
    wanted = list(dict.fromkeys(names or ()))
    if bool(wanted) == (key is not None):
        fail(WRONG_USAGE, "rm takes names, or the key of one chain with --key")
    if key is not None and name_only:
        fail(WRONG_USAGE, "--name-only goes with names: a chain without a name has none to lose")
    with opened(store) as open_store:
        if key is not None:
            removed = _forget_chain(open_store, key, dry_run, yes)
        else:
            removed = _forget_names(open_store, wanted, name_only, dry_run, yes)
    _tell(removed, as_json, dry_run)


def _forget_chain(store: PrefixStore, key: str, dry_run: bool, yes: bool) -> Forgotten:
    found = chain(store, key)
    if found.names:
        fail(WRONG_USAGE, f"the chain {found.key[:12]} is called {found.names[0]!r}; pass its name instead of --key")
    if dry_run:
        return store.would_forget_chain(found.key)
    confirm(f"Forget the chain {found.key[:12]}, {found.tokens} tokens?", yes)
    return store.forget_chain(found.key)


def _forget_names(store: PrefixStore, names: Sequence[str], name_only: bool, dry_run: bool, yes: bool) -> Forgotten:
    known = {each.name for each in store.names()}
    chats = [name for name in names if name not in known and store.chats.read(name) is not None]
    found = [named(store, name) for name in names if name not in chats]  # all of them, or none
    if dry_run:
        return Forgotten(0, 0) if name_only else store.would_forget([each.name for each in found])
    for name in chats:
        confirm(f"Forget the chat {plain(name)}, of which only the messages are kept?", yes)
    for each in found:
        pinned = ", which is pinned" if each.pinned else ""
        if name_only:
            confirm(f"Take the name {plain(each.name)} away{pinned}?", yes)
        else:
            own = f"{size(each.own_bytes)} that nothing else uses"
            confirm(f"Forget {plain(each.name)}{pinned}: {each.tokens} tokens, {own}?", yes)
    removed = Forgotten(0, 0)
    for name in chats:
        store.forget(name)
    for each in found:
        if name_only:
            store.unname(each.name)
        else:
            gone = store.forget(each.name)
            removed = Forgotten(removed.blocks + gone.blocks, removed.nbytes + gone.nbytes)
    return removed


def prune(
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="SIZE", help="Evict until the store takes no more than SIZE, e.g. 10GiB."),
    ] = None,
    unused_for: Annotated[
        str | None,
        typer.Option(
            "--unused-for", metavar="DURATION", help="Remove blocks that were not used for so long, e.g. 30d."
        ),
    ] = None,
    expired: Annotated[bool, typer.Option("--expired", help="Remove expired prefixes alone, without asking.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    store: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Make room. Expired prefixes are always removed. Pinned prefixes, and blocks being read, stay."""
    with told():
        to_bytes = None if to is None else parse_size(to, "--to")
        seconds = None if unused_for is None else parse_seconds(unused_for, "--unused-for")
    if to_bytes is None and seconds is None and not expired:
        fail(WRONG_USAGE, "say what may go: --to SIZE, --unused-for DURATION or --expired")
    if expired and (to_bytes is not None or seconds is not None):
        fail(WRONG_USAGE, "--expired is for itself: the other options remove what has expired, too")
    with opened(store) as open_store:
        if dry_run:
            _tell(open_store.would_prune(to_bytes=to_bytes, unused_for=seconds), as_json, dry_run)
            return
        before = _disk_bytes(open_store)
        if seconds is not None:
            confirm(f"Remove what was not used for {unused_for}, pinned names excepted?", yes)
        if to_bytes is not None and before > to_bytes:
            confirm(f"Evict until no more than {size(to_bytes)} are left of {size(before)}?", yes)
        with spinner("Removing …"):
            removed = open_store.prune(to_bytes=to_bytes, unused_for=seconds)
        left = _disk_bytes(open_store)
    _tell(removed, as_json)
    if to_bytes is not None and left > to_bytes and not as_json:
        print_line(make_console(), f"{size(left)} are left: the rest is pinned, or being read.")


def _disk_bytes(store: PrefixStore) -> int:
    return sum(tier.nbytes for tier in store.stats().tiers if tier.tier == "disk")


def clear(dry_run: DryRun = False, yes: Yes = False, store: Folder = DEFAULT_FOLDER, as_json: AsJson = False) -> None:
    """Remove everything for good: all names, chats and blocks, pinned ones too. The empty store stays."""
    with opened(store) as open_store:
        usage = open_store.usage()
        if dry_run:
            removed = Forgotten(sum(root.blocks for root in usage.roots), usage.nbytes)
        else:
            names = len(open_store.names())
            confirm(f"Remove all {size(usage.nbytes)} in {plain(open_store.path)}, {names} names among them?", yes)
            with spinner("Removing …"):
                removed = open_store.clear()
    _tell(removed, as_json, dry_run)


def _tell(removed: Forgotten, as_json: bool, dry_run: bool = False) -> None:
    done = "Would remove" if dry_run else "Removed"
    text = f"{done} {removed.blocks} block{'' if removed.blocks == 1 else 's'}, {size(removed.nbytes)}."
    record = {"removed_blocks": removed.blocks, "removed_bytes": removed.nbytes}
    print_result({**record, "dry_run": True} if dry_run else record, text, as_json)


def verify(
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Repair the catalog and delete damaged blocks; they are recomputed when needed."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="With --repair: list the problems, and change nothing.")
    ] = False,
    yes: Yes = False,
    store: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Read every file and compare it with its checksum and with the catalog. Exit code 1 when something is wrong."""
    repair = repair and not dry_run
    with opened(store) as open_store:
        if repair:
            confirm("Delete what is damaged, and put right what can be?", yes)
        with progress_bar("Verifying") as progress:
            report = open_store.verify(repair=repair, progress=progress)
        folder = str(open_store.path)
    if as_json:
        print_json(
            {
                "ok": report.ok,
                "blocks": report.blocks,
                "bytes": report.nbytes,
                "seconds": report.seconds,
                "problems": [asdict(problem) for problem in report.problems],
            }
        )
    else:
        _print_report(report, repair, folder)
    raise typer.Exit(0 if report.ok else FAILED)


def _print_report(report: VerifyReport, repair: bool, folder: str) -> None:
    console = make_console()
    if report.problems:
        rows = [
            (problem.kind, "repaired" if problem.repaired else "open", _what(problem, folder))
            for problem in report.problems
        ]
        columns = (Column("problem", "left"), Column("state", "left"), Column("what", "left", folds=True))
        print_table(console, columns, rows)
        console.print()
    found = f"{report.blocks} blocks, {size(report.nbytes)}, are whole ({report.seconds:.1f} s)."
    open_problems = sum(not problem.repaired for problem in report.problems)
    if not report.problems:
        print_line(console, f"Nothing is wrong. {found}")
    elif not open_problems:
        print_line(console, f"All problems were repaired. {found}")
    else:
        hint = "" if repair else " kvtier store verify --repair puts right what can be."
        print_line(console, f"{open_problems} problem{'' if open_problems == 1 else 's'} left. {found}{hint}")


def _what(problem: Problem, folder: str) -> str:
    text = problem.text if problem.subject in problem.text else f"{problem.subject}: {problem.text}"
    return text.replace(f"{folder}{os.sep}", "")
