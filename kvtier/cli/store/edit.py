"""The commands that change names and pins: ``name``, ``rename``, ``pin`` and ``unpin``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvtier.cli.store.common import DEFAULT_FOLDER, WRONG_USAGE, AsJson, Folder, chain, fail, named, opened, told
from kvtier.cli.store.completion import complete_key, complete_name
from kvtier.cli.store.listing import name_record
from kvtier.cli.store.output import make_console, print_json, print_line, print_result
from kvtier.store import PrefixStore
from kvtier.store.names import NamedPrefix
from kvtier.units import parse_seconds, size


def name(
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY", autocompletion=complete_key, help="The first digits of a key, from ls --unnamed."
        ),
    ],
    new_name: Annotated[str, typer.Argument(metavar="NAME", help="The new name.")],
    pin: Annotated[bool, typer.Option("--pin", help="Never evict it.")] = False,
    ttl: Annotated[
        str | None, typer.Option("--ttl", metavar="DURATION", help="Forget it when unused for so long, e.g. 30d.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="If another prefix has the name, take it from that prefix.")
    ] = False,
    store: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Give a name to an unnamed chain. A chain may have several names."""
    with told():
        seconds = None if ttl is None else parse_seconds(ttl, "--ttl")
    with opened(store) as open_store:
        found = chain(open_store, key)
        if not replace and any(each.name == new_name for each in open_store.names()):
            fail(WRONG_USAGE, f"{new_name!r:.80} is the name of something else already; pass --replace to take it")
        done = open_store.name_chain(found.key, new_name, pin=pin, ttl=seconds)
    print_result(name_record(done), f"{done.name} now names {done.tokens} tokens, {size(done.nbytes)}.", as_json)


def rename(
    old: Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete_name, help="The name of the prefix.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new name.")],
    store: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Rename a prefix."""
    with opened(store) as open_store:
        named(open_store, old)
        open_store.rename(old, new)
        done = open_store.named(new)
    print_result(name_record(done), f"{old} is now called {new}.", as_json)


def pin(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", autocompletion=complete_name, help="The names of prefixes.")
    ],
    store: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Never evict the prefixes with these names."""
    _change(names, store, PrefixStore.pin, _pinned, as_json)


def _pinned(prefix: NamedPrefix) -> str:
    lost = prefix.tokens - prefix.kept_tokens
    warning = f" {lost} of its tokens are gone already." if lost else ""
    return f"{prefix.name} is pinned, {size(prefix.nbytes)}.{warning}"


def unpin(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME", autocompletion=complete_name, help="The names of prefixes."),
    ],
    store: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Let the prefixes with these names be evicted again."""
    _change(names, store, PrefixStore.unpin, lambda prefix: f"{prefix.name} is no longer pinned.", as_json)


def _change(
    names: Sequence[str],
    store: Path,
    change: Callable[[PrefixStore, str], None],
    words: Callable[[NamedPrefix], str],
    as_json: bool,
) -> None:
    """Apply ``change`` to all ``names``, or to none when one is unknown; print ``words`` of each prefix."""
    with opened(store) as open_store:
        for each in names:
            named(open_store, each)
        for each in names:
            change(open_store, each)
        done = [open_store.named(each) for each in names]
    if as_json:
        print_json({"names": [name_record(prefix) for prefix in done]})
        return
    for prefix in done:
        print_line(make_console(), words(prefix))
