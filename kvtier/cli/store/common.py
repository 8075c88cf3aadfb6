"""Parts of all store commands: opening a store, reporting failures, asking before a deletion.

Exit codes: 0 fine; 1 problems were found, or the command failed; 2 it was called wrongly (also: no store, no such
name); 130 interrupted. A failure is one line on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from kvtier.cli.store.output import plain
from kvtier.errors import ConfigurationError, KvtierError, UnknownNameError
from kvtier.platform.filesystem import folder_path
from kvtier.store import PrefixStore
from kvtier.store.manage.inventory import Chain
from kvtier.store.names import NamedPrefix
from kvtier.store.open_stores import STORE_VARIABLE

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130
DEFAULT_FOLDER = Path("~/.cache/kvtier")
# Budgets belong to the programs that fill a store. No command may evict because of a smaller budget of its own.
_NO_BUDGET = 2**62

Folder = Annotated[
    Path, typer.Option("--store", metavar="FOLDER", envvar=STORE_VARIABLE, help="The folder of the store.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, and nothing else, on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="List what would be removed, and remove nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask. Needed where standard input is no terminal.")]


def someone_is_there() -> bool:
    """Whether a person can be asked."""
    return sys.stdin.isatty()


def confirm(question: str, yes: bool) -> None:
    """Ask on standard error; end the command unless the answer is yes.

    Args:
        question: the question, which names the action.
        yes: whether ``--yes`` was passed.
    """
    if yes:
        return
    if not someone_is_there():
        fail(WRONG_USAGE, "standard input is not a terminal, so nothing can be confirmed; nothing was done: pass --yes")
    # Not typer.confirm: it writes to standard output, which belongs to the output of the command.
    typer.echo(f"{question} [y/N] ", nl=False, err=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        fail(FAILED, "nothing was done")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error, if that is a terminal; yields a function of bytes done and bytes in all."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def spinner(what: str) -> Iterator[None]:
    """Show a spinner on standard error, if that is a terminal."""
    console = Console(stderr=True)
    # A file name may look like markup.
    with console.status(Text(plain(what))) if console.is_terminal else nullcontext():
        yield


def exists(file: Path) -> bool:
    """Return whether ``file`` exists; end the command when its folder cannot be looked into."""
    try:
        return file.exists()
    except OSError as error:
        fail(FAILED, f"cannot look for {file}: {error}")


def fail(code: int, text: object) -> NoReturn:
    """End the command with ``code`` and one line on standard error."""
    typer.echo(f"kvtier store: {plain(' '.join(str(text).split()))}", err=True)
    raise typer.Exit(code)


@contextmanager
def told() -> Iterator[None]:
    """Turn failures into one line and an exit code."""
    try:
        yield
    except (UnknownNameError, ConfigurationError) as error:
        fail(WRONG_USAGE, error)
    except KvtierError as error:
        fail(FAILED, error)
    except KeyboardInterrupt:
        fail(INTERRUPTED, "interrupted")


@contextmanager
def existing_store(folder: Path) -> Iterator[PrefixStore | None]:
    """Open the store in ``folder``; yields None if there is none, and makes none."""
    folder = folder.expanduser()
    if not (folder / "kvtier.json").is_file():
        yield None
        return
    with PrefixStore(folder, disk_budget=_NO_BUDGET) as store:
        yield store


@contextmanager
def opened(folder: Path, *, create: bool = False) -> Iterator[PrefixStore]:
    """Open the store in ``folder`` until the command ends; failures within are reported as by ``told``.

    Args:
        folder: folder of the store.
        create: make a missing store. Otherwise a missing store is an error, and nothing is written.
    """
    with told():
        folder = folder_path(folder, "--store")
        try:
            exists = create or (folder / "kvtier.json").is_file()
        except OSError as error:
            fail(FAILED, f"cannot look into {folder}: {error}")
        if not exists:
            fail(
                WRONG_USAGE,
                f"there is no store in {folder} (it has no kvtier.json); name its folder with --store or in the "
                f"environment variable {STORE_VARIABLE}",
            )
        with PrefixStore(folder, disk_budget=_NO_BUDGET, progress=True) as store:
            yield store


def named(store: PrefixStore, name: str) -> NamedPrefix:
    """Return the prefix called ``name``; end the command when there is none."""
    try:
        return store.named(name)
    except UnknownNameError:
        fail(WRONG_USAGE, f"nothing in {store.path} is called {name!r:.80}; kvtier store ls lists what has a name")


def chain(store: PrefixStore, key: str) -> Chain:
    """Return the one chain whose key begins with ``key``; end the command when there are none or several."""
    found = [each for each in store.chains() if each.key.startswith(key.lower())] if key else []
    if len(found) != 1:
        known = f"{len(found)} chains have keys that begin" if found else "no chain in the store has a key that begins"
        fail(WRONG_USAGE, f"{known} with {key!r:.80}; kvtier store ls --unnamed lists those without a name")
    return found[0]
