"""``kvtier plan``: what a model's K and V take, and when loading them beats computing them, from its config alone.

Exit codes: 0 fine; 2 called wrongly, or the config cannot be read; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from kvtier.cli.store.output import make_console
from kvtier.errors import ConfigurationError

_DTYPES = ("float32", "bfloat16", "float16")
_DEFAULT_LENGTHS = (1024, 8192, 32768)


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a config.json, or a name on the hub.")],
    tokens: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=2, help="Length of a prompt; repeat it for several. Default: 1024, 8192, 32768."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="here: the accelerator or CPU of this machine, measured; cpu: its CPU, measured; or a name like T4, "
            "RTX 4090, A100, H100, from a table of data sheets.",
        ),
    ] = "here",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help=f"dtype of weights, K and V: {', '.join(_DTYPES)}. Default: the config's."),
    ] = None,
    device_budget: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES", help="Bytes for K and V on the device, e.g. 6GiB. Default: its memory less the weights."
        ),
    ] = None,
    host_budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Bytes of RAM for a store, e.g. 4GiB.")
    ] = None,
    disk_budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Bytes of files for a store, e.g. 50GiB.")
    ] = None,
    host_rate: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Bytes a second from RAM to the device, if you know.")
    ] = None,
    disk_rate: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Bytes a second from the drive, e.g. 3GB, if you know.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs, and nothing else.")] = False,
) -> None:
    """Predict what K and V of a model take, and how fast reuse is, from its config alone."""
    try:
        _plan(
            model,
            sorted(set(tokens or _DEFAULT_LENGTHS)),
            device,
            dtype,
            {"device": device_budget, "host": host_budget, "disk": disk_budget},
            {"host": host_rate, "disk": disk_rate},
            as_json,
        )
    except ConfigurationError as error:
        typer.echo(f"kvtier plan: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def _plan(
    model: str,
    lengths: list[int],
    device: str,
    dtype: str | None,
    budgets: dict[str, str | None],
    rates: dict[str, str | None],
    as_json: bool,
) -> None:
    # Imported here: the other commands need not wait for the models of transformers.
    import torch

    from kvtier.cli.plan import forecast, surroundings, tables
    from kvtier.costs.machines import named_machine
    from kvtier.hf.meta_model import read_config
    from kvtier.hf.model_sheet import model_sheet

    if dtype is not None and dtype not in _DTYPES:
        raise ConfigurationError(f"--dtype={dtype!r:.80} must be one of {', '.join(_DTYPES)}.")
    if device not in ("here", "cpu"):
        named_machine(device)  # a wrong name is told before anything is fetched
    sheet = model_sheet(read_config(model), getattr(torch, dtype) if dtype is not None else None)
    where = surroundings.surroundings(device, sheet.dtype, sheet.weight_bytes, budgets, rates)
    found = forecast.forecast(sheet, where, lengths)
    if as_json:
        sys.stdout.write(json.dumps({"model_name": model, **forecast.as_json(sheet, where, found)}, indent=1) + "\n")
        return
    tables.print_plan(make_console(), model, sheet, where, found)
