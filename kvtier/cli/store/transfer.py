"""``export`` and ``import``: one named prefix as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtier.cli.store.common import (
    DEFAULT_FOLDER,
    WRONG_USAGE,
    AsJson,
    Folder,
    exists,
    fail,
    named,
    opened,
    progress_bar,
    spinner,
    told,
)
from kvtier.cli.store.completion import complete_name
from kvtier.cli.store.listing import name_record
from kvtier.cli.store.output import print_result
from kvtier.errors import ConfigurationError
from kvtier.store.format.archive import Archive
from kvtier.units import size


def export(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete_name, help="The name of the prefix.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; it must not exist.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    store: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Write a named prefix to one file. Every reader of the file can read the tokens of the conversation."""
    if exists(file) and not overwrite:
        fail(WRONG_USAGE, f"{file} exists already; pass --overwrite to replace it, or name another file")
    with opened(store) as open_store:
        prefix = named(open_store, name)
        with spinner(f"Writing {file} …"):
            nbytes = open_store.export(name, file, overwrite=overwrite)
    text = f"Wrote {name}, {prefix.kept_tokens} tokens, to {file}: {size(nbytes)}."
    print_result({"file": str(file), "file_bytes": nbytes, **name_record(prefix)}, text, as_json)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that export has written.")],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="A new name. Default: the name that it had.")
    ] = None,
    store: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Import a file that export has written. Import only from sources you trust: no check can verify K and V."""
    if not exists(file):
        fail(WRONG_USAGE, f"there is no file {file}")
    with told(), Archive(file) as archive:  # checked before a store is made for it
        if name is None and archive.name is None:
            fail(WRONG_USAGE, f"{file} does not say what it is called; pass --name")
    with opened(store, create=True) as open_store, progress_bar("Checking") as progress:
        try:
            done = open_store.import_(file, name=name, progress=progress)
        except ConfigurationError as error:  # its message names Python arguments
            fail(WRONG_USAGE, f"{str(error).rstrip('.')} with --name")
        folder = open_store.path
    text = f"Took in {done.name}, {done.kept_tokens} tokens, {size(done.nbytes)}."
    print_result({"store": str(folder), **name_record(done)}, text, as_json)
