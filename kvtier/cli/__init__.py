"""The ``kvtier`` command.

Modules of commands import only what ``--help`` needs; a command imports its heavy parts when it runs. Looking after a
store takes neither torch nor transformers.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import kvtier
from kvtier.cli import store
from kvtier.cli.bench import command as bench
from kvtier.cli.chat import command as chat
from kvtier.cli.chat import warm
from kvtier.cli.demo import command as demo
from kvtier.cli.doctor import command as doctor
from kvtier.cli.help import Command, Group
from kvtier.cli.plan import command as plan

app = typer.Typer(
    name="kvtier",
    cls=Group,
    help="Keep attention state across generate() calls and processes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"kvtier {kvtier.__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keep attention state across generate() calls and processes."""


app.command(cls=Command)(demo.demo)
app.command(cls=Command)(chat.chat)
app.command(cls=Command)(warm.warm)
app.command(cls=Command)(doctor.doctor)
app.command(cls=Command)(plan.plan)
app.command(cls=Command)(bench.bench)
app.add_typer(store.app)
