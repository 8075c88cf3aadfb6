"""``python -m benchmarks``: run all benchmarks, each in a process of its own, or those that are named."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.machine import CHECKOUT, describe_machine
from benchmarks.measure import BenchmarkError, Options, SkippedError
from benchmarks.result import Result, write_json
from benchmarks.table import print_result

NAMES = (
    "ttft",
    "start",
    "restore",
    "decode",
    "first_turn",
    "imports",
    "commands",
    "identity",
    "memory",
    "stream",
    "window",
    "update",
    "catalog",
    "ram_tier",
    "writes",
    "eviction",
    "checkpoints",
    "sliding",
    "break_even",
    "gpu",
    "gpu_turns",
)
_WIDTH = 120  # narrower, and the tables lose figures
RESULTS = CHECKOUT / "benchmarks" / "results"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Which: {', '.join(NAMES)}. Default: all.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each. Default: its own.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short and few: to see it run, not to quote.")] = False,
    output: Annotated[Path | None, typer.Option(file_okay=False, help="Folder of the JSON files.")] = None,
    trace: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Requests that eviction replays, JSON lines.")
    ] = None,
) -> None:
    """Measure kvtier on a small real model; write one JSON file for each benchmark and print it as a table."""
    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown:
        raise typer.BadParameter(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    folder = output or (RESULTS / "quick" if quick else RESULTS)
    if names is not None and len(names) == 1:
        failed = not _run_here(names[0], Options(rounds, quick, _say, trace), folder)
    else:
        # One process each: what one benchmark leaves in memory must not decide how fast the next one gets its own.
        settings = ["--output", str(folder.resolve()), *(["--quick"] if quick else [])]
        settings += ["--rounds", str(rounds)] if rounds is not None else []
        settings += ["--trace", str(trace.resolve())] if trace is not None else []
        command = [sys.executable, "-m", "benchmarks", *settings]
        ended = [subprocess.run([*command, name], cwd=CHECKOUT, check=False) for name in names or NAMES]
        failed = any(process.returncode for process in ended)
    raise typer.Exit(1 if failed else 0)


def _run_here(name: str, options: Options, folder: Path) -> bool:
    """Run one benchmark in this process; return whether all answers were right. One that is skipped had none."""
    console = Console()
    console.width = max(console.width, _WIDTH)
    machine = describe_machine()
    try:
        result: Result = importlib.import_module(f"benchmarks.{name}").run(options)
    except SkippedError as reason:
        console.print(f"{name} skipped: {reason}")
        return True
    except BenchmarkError as error:
        console.print(f"[bold red]{name} could not be measured:[/] {error}")
        return False
    if options.quick:  # the targets are promises about full lengths and rounds
        result = replace(result, targets=())
    path = write_json(result, machine, folder)
    print_result(console, result)
    console.print(f"[dim]written to {path}[/]")
    return not result.wrong


def _say(text: str) -> None:
    sys.stderr.write(f"  {text}\n")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
