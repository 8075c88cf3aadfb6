"""What the shell offers for a command: names, keys of chains and filters of the store. It never makes a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from kvtier.cli.store.common import DEFAULT_FOLDER, existing_store
from kvtier.cli.store.listing import FILTER_KEYS
from kvtier.cli.store.output import plain
from kvtier.cli.store.roots import RootFile
from kvtier.store import PrefixStore
from kvtier.units import size

_Offers = list[tuple[str, str]]


def _offered(
    context: typer.Context, incomplete: str, offers: Callable[[PrefixStore], Iterable[tuple[str, str]]]
) -> _Offers:
    """Return the offers of the store of a command line that begin with ``incomplete``, each with a help text."""
    folder = Path(context.params.get("store") or DEFAULT_FOLDER)
    try:
        with existing_store(folder) as store:
            if store is None:
                return []
            return [(value, plain(text)) for value, text in offers(store) if value.startswith(incomplete)]
    except Exception:  # a shell shows nothing where nothing can be offered
        return []


def complete_name(context: typer.Context, incomplete: str) -> _Offers:
    """Offer the names of the store."""
    return _offered(
        context,
        incomplete,
        lambda store: ((each.name, f"{each.tokens} tokens, {size(each.nbytes)}") for each in store.names()),
    )


def complete_key(context: typer.Context, incomplete: str) -> _Offers:
    """Offer the keys of chains without a name."""
    return _offered(
        context,
        incomplete,
        lambda store: (
            (chain.key[: max(12, len(incomplete))], f"{chain.tokens} tokens, {size(chain.nbytes)}")
            for chain in store.chains()
            if not chain.names
        ),
    )


def complete_filter(context: typer.Context, incomplete: str) -> _Offers:
    """Offer the keys of filters; after ``root=`` the roots of the store, and after ``name=`` its names."""
    if incomplete.startswith("name="):
        return [(f"name={name}", text) for name, text in complete_name(context, incomplete.removeprefix("name="))]
    if incomplete.startswith("root="):
        return _offered(
            context,
            incomplete,
            lambda store: (
                (f"root={used.root[:12]}", RootFile.read(Path(str(store.path)), used.root).title)
                for used in store.usage().roots
            ),
        )
    return [(f"{key}=", "") for key in FILTER_KEYS if key.startswith(incomplete)]


InsteadOfAName = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        autocompletion=complete_key,
        help="Instead of a name: the first digits of a key, from ls --unnamed.",
    ),
]
