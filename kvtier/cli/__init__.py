"""The ``kvtier`` command."""

from __future__ import annotations

import typer

from kvtier.cli import store
from kvtier.cli.bench import command as bench
from kvtier.cli.chat import command as chat
from kvtier.cli.chat import warm
from kvtier.cli.demo import command as demo
from kvtier.cli.doctor import command as doctor
from kvtier.cli.plan import command as plan

app = typer.Typer(
    name="kvtier",
    help="Keep attention state across generate() calls and processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keep attention state across generate() calls and processes."""


app.command()(demo.demo)
app.command()(chat.chat)
app.command()(warm.warm)
app.command()(doctor.doctor)
app.command()(plan.plan)
app.command()(bench.bench)
app.add_typer(store.app)
