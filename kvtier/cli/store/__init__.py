"""``kvtier store``: commands that list, name, pin, remove, verify and transfer stored prefixes."""

from __future__ import annotations

import typer

from kvtier.cli.help import Command, Group
from kvtier.cli.store import edit, inspect, maintain, transfer

app = typer.Typer(
    name="store",
    cls=Group,
    help="Look after a store: see what it holds, name, pin, remove, verify and carry it.",
    epilog="Exit codes: 0 fine, 1 problems found or failed, 2 called wrongly, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

for _command in (
    inspect.ls,
    inspect.show,
    inspect.du,
    inspect.stats,
    edit.name,
    edit.rename,
    edit.pin,
    edit.unpin,
    transfer.export,
    maintain.rm,
    maintain.prune,
    maintain.clear,
    maintain.verify,
):
    app.command(cls=Command)(_command)
app.command(name="import", cls=Command)(transfer.import_)
