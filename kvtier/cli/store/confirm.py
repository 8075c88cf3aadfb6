"""Asking before something is destroyed, and showing how far something is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from kvtier.cli.store.common import FAILED, WRONG_USAGE, fail
from kvtier.cli.store.tables import plain

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask. Needed where nobody can be asked.")]


def someone_is_there() -> bool:
    """Whether a person can be asked."""
    return sys.stdin.isatty()


def confirm(question: str, yes: bool) -> None:
    """Ask on standard error; end the command unless the answer is yes.

    Args:
        question: what is about to happen, as a question.
        yes: whether it was answered on the command line.
    """
    if yes:
        return
    if not someone_is_there():
        fail(WRONG_USAGE, "nobody can be asked, since standard input is no terminal; nothing was done: pass --yes")
    # Not typer.confirm: it writes to standard output, which belongs to what the command prints.
    typer.echo(f"{question} [y/N] ", nl=False, err=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        fail(FAILED, "nothing was done")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error, if that is a terminal; gives what to call with bytes done and bytes in all."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def spinner(what: str) -> Iterator[None]:
    """Show on standard error, if that is a terminal, that something is being done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(Text(plain(what))):  # a file may be called like markup
        yield
