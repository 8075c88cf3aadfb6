"""``kvtier store``: what a store holds, and what is to become of it."""

from __future__ import annotations

import typer

from kvtier.cli.store import edit as naming
from kvtier.cli.store import inspect as looking
from kvtier.cli.store import removing
from kvtier.cli.store import transfer as carrying
from kvtier.cli.store import verify as checking

app = typer.Typer(
    name="store",
    help="Look after a store: see what it holds, name, pin, remove, verify and carry it.",
    epilog="Exit codes: 0 fine, 1 problems found or failed, 2 called wrongly, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

for _command in (
    looking.ls,
    looking.show,
    looking.du,
    looking.stats,
    naming.name,
    naming.rename,
    naming.pin,
    naming.unpin,
    carrying.export,
    removing.rm,
    removing.prune,
    checking.verify,
):
    app.command()(_command)
app.command(name="import")(carrying.import_)
